"""The `config.json` of a run on quantized weights."""

import json
import sys

import pytest
import transformers
from llava_mixlora.patches.llava_train import _train_checked
from transformers import AutoConfig, BitsAndBytesConfig


@pytest.fixture
def save(patched, llama, tmp_path, monkeypatch):
    """Saves the configuration of a quantized model; with flags, from inside a train() that has parsed them."""
    from llava.train import train as upstream

    llama.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)

    def body(attn_implementation=None):
        transformers.HfArgumentParser(upstream.TrainingArguments).parse_args_into_dataclasses(
            return_remaining_strings=True
        )
        llama.config.save_pretrained(tmp_path)

    def save(*flags):
        if flags:
            turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
            (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}]))
            words = [f"--output_dir={tmp_path}", f"--data_path={tmp_path / 'data.json'}", "--use_cpu", *flags]
            monkeypatch.setattr(sys, "argv", ["train.py", *words])
            _train_checked(body)()
        else:
            llama.config.save_pretrained(tmp_path)
        return json.loads((tmp_path / "config.json").read_text())

    return save


@pytest.mark.parametrize("bits", ["4", "8"])
def test_configuration_beside_an_adapter_leaves_quantization_out(save, llama, tmp_path, bits):
    saved = save("--lora_enable", "--bits", bits)
    assert "quantization_config" not in saved
    assert saved["hidden_size"] == llama.config.hidden_size
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == llama.config.hidden_size


def test_model_in_training_keeps_its_own_configuration(save, llama):
    save("--lora_enable", "--bits", "4")
    assert llama.config.quantization_config.load_in_4bit


@pytest.mark.parametrize(
    "flags",
    [(), ("--bits", "4"), ("--lora_enable", "--bits", "16")],
    ids=["outside of training", "the weights themselves are saved", "the base was quantized before"],
)
def test_other_configurations_are_saved_as_they_are(save, flags):
    assert save(*flags)["quantization_config"]["load_in_4bit"]
