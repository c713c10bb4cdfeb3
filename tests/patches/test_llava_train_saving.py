"""What upstream's train() saves of a LLaVA with an adapter, as its functions are called there."""

import json
import stat
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from llava_mixlora.patches.llava_train import _train_checked
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llava_mixlora import MixLoraError
from llava_mixlora.adapters.adapter_folder import (
    NON_LORA_TRAINABLES,
    SAFE_NON_LORA_TRAINABLES,
    read_non_lora_trainables,
)
from llava_mixlora.adapters.adapter_record import read_record

EMBEDDINGS = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}


@pytest.fixture(params=["--lora_enable", "--mixlora_enable"])
def train(request, patched, llava, llava_folder, tokenizer_folder, tmp_path, monkeypatch):
    """Runs a body in the place of upstream's, with a tokenizer, a model with an adapter, and the upstream module."""
    from llava.train import train as upstream

    data = tmp_path / "data.json"
    data.write_text('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]')

    def run(body, *flags):
        done = {}

        def whole(attn_implementation=None):
            classes = (upstream.ModelArguments, upstream.DataArguments, upstream.TrainingArguments)
            arguments = transformers.HfArgumentParser(classes).parse_args_into_dataclasses()[2]
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)
            llava.name_or_path = str(llava_folder)
            config = LoraConfig(r=2, target_modules=["q_proj"], bias=arguments.lora_bias, task_type="CAUSAL_LM")
            done["saved"] = body(upstream, tokenizer, peft.get_peft_model(llava, config))

        words = ["--data_path", str(data), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--lora_r", "2", *flags]
        words += ["--model_name_or_path", str(llava_folder), request.param]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        _train_checked(whole)()
        return done["saved"]

    return run


def beside(upstream, model):
    return upstream.get_peft_state_non_lora_maybe_zero_3(model.named_parameters())


def test_vocabulary_that_has_not_grown_is_not_saved(train):
    assert not EMBEDDINGS & set(train(lambda upstream, _, model: beside(upstream, model)))


def test_row_of_a_padding_token_is_saved(train):
    def body(upstream, tokenizer, model):
        upstream.smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
        return beside(upstream, model)

    assert set(train(body)) >= EMBEDDINGS


@pytest.mark.parametrize("tokens", [(True, False), (False, True)])
def test_rows_of_tokens_for_images_are_saved(train, tokens):
    def body(upstream, tokenizer, model):
        patch, ends = tokens
        flags = {"tune_mm_mlp_adapter": False, "pretrain_mm_mlp_adapter": None}
        arguments = SimpleNamespace(mm_use_im_patch_token=patch, mm_use_im_start_end=ends, **flags)
        model.initialize_vision_tokenizer(arguments, tokenizer=tokenizer)
        return beside(upstream, model)

    assert set(train(body)) >= EMBEDDINGS


def test_frozen_projector_is_saved(train):
    saved = train(lambda upstream, _, model: beside(upstream, model), "--freeze_mm_mlp_adapter", "True")
    assert sum("mm_projector" in name for name in saved) == 4


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_can_be_saved_and_those_of_the_tower_are_not(train, bias):
    def body(upstream, _, model):
        return upstream.get_peft_state_maybe_zero_3(model.named_parameters(), bias)

    saved = train(body, "--lora_bias", bias)
    assert any("lora_" in name for name in saved)
    biases = [name for name in saved if name.endswith("bias")]
    assert not any("vision_tower" in name or "mm_projector" in name for name in biases)


def test_saved_adapter_tells_its_base(train, llava_folder, tmp_path):
    def body(upstream, tokenizer, model):
        upstream.smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
        model.save_pretrained(tmp_path / "adapter")

    train(body)
    assert read_record(tmp_path / "adapter").base.name_or_path == str(llava_folder)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").pad_token == "[PAD]"


def test_only_mixlora_keeps_samples_to_merge_by_and_only_where_they_are_wanted(train, request, tmp_path, monkeypatch):
    mixlora = "mixlora" in request.node.callspec.id

    def body(upstream, _, model):
        templates = upstream.conversation_lib.conv_templates
        monkeypatch.setattr(upstream.conversation_lib, "default_conversation", templates["v1"])  # as train() does
        model.save_pretrained(tmp_path / "out")

    train(body, "--version", "v1", "--mixlora_calibration_samples", "2")
    kept = tmp_path / "out" / "calibration.json"
    assert kept.is_file() == mixlora
    if mixlora:
        content = json.loads(kept.read_text())
        assert content["version"] == "v1" and content["data"] == str(tmp_path / "data.json")
        assert content["samples"][0]["conversations"][1]["value"] == "b" and content["image_folder"] is None
    train(body, "--mixlora_calibration_samples", "0")
    assert not kept.exists()


def test_a_number_of_samples_that_merging_could_not_use_is_refused(train, request):
    if "mixlora" not in request.node.callspec.id:
        pytest.skip("plain LoRA keeps none")
    with pytest.raises(MixLoraError, match="--mixlora_calibration_samples 1: expected 0"):
        train(lambda *_: None, "--mixlora_calibration_samples", "1")


def test_projector_is_saved_as_safetensors_too_and_all_files_follow_the_umask(train, tmp_path):
    folder = tmp_path / "adapter"

    def body(upstream, _, model):
        saved = beside(upstream, model)
        model.save_pretrained(folder)
        torch.save(saved, folder / NON_LORA_TRAINABLES)
        return saved

    saved, found = train(body), load_file(folder / SAFE_NON_LORA_TRAINABLES)
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert len(read_non_lora_trainables(folder)) == len(saved)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}
