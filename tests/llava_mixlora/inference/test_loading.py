"""What a loader gives back, whatever LLaVA it is of."""

import pytest
from torch import nn

from llava_mixlora import MixLoraError
from llava_mixlora.inference import loading


@pytest.mark.parametrize("processor", ["of images", {"image": "of images", "video": "of videos"}])
def test_processor_is_that_of_images_where_there_is_one_for_each_kind(llava_folder, monkeypatch, processor):
    def load_pretrained_model(model_path, model_base, model_name, device_map, device, **_):
        return "tokenizer", nn.Linear(2, 2), processor, 2048

    monkeypatch.setattr(loading, "part", lambda name: load_pretrained_model)
    assert loading.load_for_inference(llava_folder)[2] == "of images"


def test_loader_that_asks_for_more_than_files_tell_is_named(llava_folder, monkeypatch):
    def load_pretrained_model(model_path, model_base, model_name, kind, device="cuda"):
        raise AssertionError("asked without a kind")

    monkeypatch.setattr(loading, "part", lambda name: load_pretrained_model)
    with pytest.raises(MixLoraError, match="load_pretrained_model of llava asks for 'kind', which no file"):
        loading.load_for_inference(llava_folder)
