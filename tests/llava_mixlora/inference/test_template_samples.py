"""What a LLaVA without a training program is measured on: what LLaVA's own training makes of the same conversations."""

import pytest
import torch
from transformers import AutoTokenizer, CLIPImageProcessor

from llava_mixlora import llava_package
from llava_mixlora.inference.samples import training_data
from llava_mixlora.inference.template_samples import TemplateSamples

from ...tiny import draw_pictures

TURNS = ("what color is the shape?", "red"), ("is it?", "blue square"), ("color?", "green")


def sample(*turns, image=None):
    conversations = []
    for place, (question, answer) in enumerate(turns):
        question = f"{question}\n<image>" if image and not place else question
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": conversations, **({"image": image} if image else {})}


SAMPLES = [sample(TURNS[0], image="0.png"), sample(*TURNS, image="1.png"), sample(*TURNS[1:])]


@pytest.fixture
def loaded(llava, exact_tokenizer_folder, clip_folder):
    # Of one that drops spaces at a text's end, LLaVA's labels have the colon before an answer too (transformers 4).
    tokenizer = AutoTokenizer.from_pretrained(exact_tokenizer_folder, use_fast=False, model_max_length=200)
    return tokenizer, llava, CLIPImageProcessor.from_pretrained(clip_folder)


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "mistral_instruct"])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_batches_are_those_of_llavas_own_training(loaded, tmp_path, version, aspect):
    draw_pictures(tmp_path, 2)
    loaded[1].config.image_aspect_ratio = aspect
    dataset, collate = training_data(SAMPLES, loaded, tmp_path, version)
    expected = collate([dataset[number] for number in range(len(SAMPLES))])
    own = TemplateSamples(SAMPLES, loaded, tmp_path, version)
    found = own.collate([own[number] for number in range(len(own))])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_they_are_taken_where_a_llava_has_no_training_program(loaded, tmp_path, monkeypatch):
    module = llava_package.LlavaPackage.module
    monkeypatch.setattr(
        llava_package.LlavaPackage, "module", lambda self, name: None if "train" in name else module(self, name)
    )
    assert isinstance(training_data(SAMPLES, loaded, tmp_path, "v1")[0], TemplateSamples)
