"""What a loader gives back, whatever LLaVA it is of."""

import pytest
from torch import nn

from llava_mixlora.inference import loading


@pytest.mark.parametrize("processor", ["of images", {"image": "of images", "video": "of videos"}])
def test_processor_is_that_of_images_where_there_is_one_for_each_kind(llava_folder, monkeypatch, processor):
    def load_pretrained_model(model_path, model_base, model_name, device_map, device, **_):
        return "tokenizer", nn.Linear(2, 2), processor, 2048

    monkeypatch.setattr(loading, "part", lambda name: load_pretrained_model)
    assert loading.load_for_inference(llava_folder)[2] == "of images"
