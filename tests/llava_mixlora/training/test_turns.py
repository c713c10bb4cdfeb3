"""The turns of a conversation, as upstream's `preprocess_v1` finds their ends."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, LlamaConfig, MistralConfig

from llava_mixlora.training.turns import counts_turns_alone

ANSWERS = ["red", "a green circle", "blue"]


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def load(request, tokenizer_folder, tmp_path):
    """The tokenizer of a base of some kind, from either of the files that it may come in."""

    def load(config, legacy):
        folder = shutil.copytree(tokenizer_folder, tmp_path / f"{config.model_type}-{legacy}")
        told = json.loads((folder / "tokenizer_config.json").read_text())
        told.update(legacy=legacy, add_bos_token=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
        if request.param == "tokenizer.json":
            LlamaConfig().save_pretrained(folder)
            AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
            (folder / "tokenizer_config.json").write_text(json.dumps(told))
        config.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=256, padding_side="right", use_fast=False)
        tokenizer.pad_token = tokenizer.unk_token
        return tokenizer

    return load


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig()], ids=["Llama", "Mistral"])
@pytest.mark.parametrize("image", [True, False])
def test_answers_of_every_turn_are_learnt(load, patched, monkeypatch, config, legacy, image):
    from llava import conversation
    from llava.train import train

    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates["v1"])
    turns = []
    for number, answer in enumerate(ANSWERS):
        question = "what color is the shape?" if number or not image else "<image>\nwhat color is the shape?"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    tokenizer = load(config, legacy)
    labels = train.preprocess_v1([turns], tokenizer, has_image=image)["labels"][0]
    learnt = tokenizer.decode(labels[labels >= 0]).replace(" ", "").replace(":", "")  # which ends a role's name
    assert learnt == "".join(f"{answer}</s>" for answer in ANSWERS).replace(" ", "")


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_counts_as_its_tokenizer_says(load, legacy):
    tokenizer = load(LlamaConfig(), legacy)
    assert counts_turns_alone(tokenizer) is legacy is tokenizer.legacy
