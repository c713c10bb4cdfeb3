"""Runs that give the vocabulary tokens and train biases: what they save can be loaded, merged and gone on from."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mixlora.adapters.adapter_folder import read_non_lora_trainables
from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import read_questions
from llava_mixlora.inference.loading import load_for_inference

from ..conftest import LLAMA
from ..tiny import VOCABULARY
from .training import ALONE, PAPER_FORM, PLUGIN, environment, train, write_inputs

NEW = ["[PAD]", "<im_patch>", "<im_start>", "<im_end>"]
FLAGS = ["--version=v0", "--mm_use_im_start_end=True", "--mm_use_im_patch_token=True", "--lora_bias=lora_only"]
LEARN = ["--per_device_train_batch_size=8", "--optim=adamw_torch", "--learning_rate=0.02", "--lora_alpha=16"]
SAVE = ["--save_strategy=steps", "--save_steps=20"]
STEPS = "--max_steps=40"


@pytest.fixture(scope="module")
def bare(_llava, clip_folder, tokenizer_folder, tmp_path_factory):
    """A language model whose attention has biases, and eight pictures with a question each."""
    place = tmp_path_factory.mktemp("new-tokens")
    flags = write_inputs(place, _llava, clip_folder, tokenizer_folder, 8 * ["red"])
    torch.manual_seed(6)
    shutil.rmtree(place / "llava")
    shutil.copytree(tokenizer_folder, place / "llava")
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, attention_bias=True, **LLAMA)).save_pretrained(place / "llava")
    chosen = ("--version", "--mm_use_im_patch_token")
    return place, [flag for flag in flags if not flag.startswith(chosen)]


@pytest.fixture(scope="module", params=["MixLoRA", "LoRA"])
def adapter(request, bare):
    kind = (
        ["--mixlora_enable=True", "--mixlora_num_factors=4", *PAPER_FORM]
        if request.param == "MixLoRA"
        else ["--lora_enable=True"]
    )
    output = bare[0] / f"llava-{request.param}-lora"
    flags = [*FLAGS, *LEARN, *SAVE, STEPS, *kind]
    train(ALONE, bare[1], output, *flags)
    return output, flags


def asked(loaded, place):
    questions = read_questions(place / "train.json")
    ((_, answers),) = answer(loaded, questions, conversation="vicuna_v1", max_new_tokens=4, progress=False)
    return answers


@pytest.mark.parametrize("folder", [".", "checkpoint-40"])
def test_rows_and_tokens_come_back(adapter, bare, folder):
    tokenizer, model, _ = loaded = load_for_inference(adapter[0] / folder)
    assert tokenizer.convert_ids_to_tokens(range(VOCABULARY, VOCABULARY + 4)) == NEW
    saved = read_non_lora_trainables(adapter[0] / folder)
    for name, module in {
        "model.embed_tokens": model.get_input_embeddings(),
        "lm_head": model.get_output_embeddings(),
    }.items():
        assert len(module.weight) == model.config.vocab_size == VOCABULARY + 4
        torch.testing.assert_close(module.weight.float(), saved[f"{name}.weight"].float(), rtol=0, atol=1e-3)
    assert asked(loaded, bare[0]) == 8 * ["red"]


def test_trained_biases_come_back(adapter):
    _, model, _ = load_for_inference(adapter[0])
    found = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    saved = {n: p for n, p in read_non_lora_trainables(adapter[0]).items() if n.endswith("q_proj.bias")}
    assert len(saved) == LLAMA["num_hidden_layers"] and all(bias.any() for bias in saved.values())
    for name, bias in saved.items():
        (place,) = [n for n in found if n.endswith(name)]
        torch.testing.assert_close(found[place].float(), bias.float(), rtol=0, atol=1e-3)


def test_run_goes_on_with_its_rows(adapter, bare, tmp_path):
    first, flags = adapter
    output = tmp_path / "llava-lora"
    shutil.copytree(first / "checkpoint-20", output / "checkpoint-20")
    train(ALONE, bare[1], output, *flags)
    wanted, found = read_non_lora_trainables(first), read_non_lora_trainables(output)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (first, output))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("command", ["merge", "export-lora"])
def test_merged_and_exported_adapter_keeps_the_rows(adapter, bare, tmp_path, command):
    if "MixLoRA" not in adapter[0].name:
        pytest.skip("a plain LoRA is merged as it is loaded")
    words = [*PLUGIN, command, "--model-path", str(adapter[0]), "--save-model-path", str(tmp_path / "llava-lora")]
    words += ["--steps", "20"]  # of distillation, which starts from what is right: there is one route
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokenizer, model, _ = loaded = load_for_inference(tmp_path / "llava-lora")
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY + 4
    assert asked(loaded, bare[0]) == 8 * ["red"]  # one route serves one question well


def test_eval_reads_the_result(adapter, bare, tmp_path):
    words = ["eval", "--model-path", str(adapter[0]), "--questions", str(bare[0] / "train.json")]
    words += ["--image-folder", str(bare[0]), "--output", str(tmp_path / "scores"), "--conv-mode", "vicuna_v1"]
    done = subprocess.run([*PLUGIN, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())
