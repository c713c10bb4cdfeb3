"""Adapters trained on quantized weights, in real processes, and loaded on bases of 16, 8 and 4 bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file

from ..tiny import layers
from .training import ALONE, PAPER_FORM, train

OBSERVER = Path(__file__).with_name("observe_training.py")
MIXLORA = ["--mixlora_enable=True", "--mixlora_num_factors=4", *PAPER_FORM]
TRAININGS = {
    "4-bit": ["--bits=4", *MIXLORA],
    "8-bit": ["--bits=8", *MIXLORA],
    "4-bit in bfloat16": ["--bits=4", "--bf16=True", *MIXLORA],
    "4-bit plain LoRA": ["--bits=4", "--lora_enable=True"],
}
FLAGS = [
    *("--max_steps=3", "--optim=adamw_torch", "--learning_rate=0.01", "--per_device_train_batch_size=4"),
    *("--save_strategy=steps", "--save_steps=2"),
]
STORED_AS = {16: torch.nn.Linear, 8: Linear8bitLt, 4: Linear4bit}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Runs one of TRAININGS, once; gives its output folder."""
    finished = {}

    def trained(name):
        if name not in finished:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-")) / "llava-lora"
            launcher = [sys.executable, "-m", "llava_mixlora", "run", str(OBSERVER)]
            train(launcher, inputs, folder, *FLAGS, *TRAININGS[name])
            finished[name] = folder
        return finished[name]

    return trained


@pytest.fixture(params=list(TRAININGS))
def training(request):
    return request.param


def observed(folder):
    return torch.load(folder / "observed.pt", weights_only=True)


def test_language_model_is_quantized_and_nothing_else(trained, training):
    quantized = observed(trained(training))["quantized"]
    blocks = [name for name in quantized if ".layers." in name]
    assert len(blocks) == 14  # seven linear layers in each of two decoder layers
    assert not any(part in name for name in quantized for part in ("mm_projector", "vision_tower"))


def test_frozen_weights_are_untouched_to_the_bit(trained, training):
    seen = observed(trained(training))
    before, after = seen["frozen_before"], seen["frozen_after"]
    stored = [name for name, tensor in before.items() if tensor.dtype in (torch.uint8, torch.int8)]
    assert len(stored) >= 14
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_gradients_reach_everything_that_is_trained(trained, training):
    seen = observed(trained(training))
    assert seen["reached"] == set(seen["trained"])
    kinds = ["lora_A", "lora_B"]
    if "LoRA" not in training:
        kinds = ["mixlora_A", "mixlora_B", "mixlora_router_A", "mixlora_router_B", "mixlora_cfs"]
    for kind in kinds:
        assert sum(f".{kind}." in name for name in seen["reached"]) == 14
    assert sum("mm_projector" in name for name in seen["reached"]) == 4


def test_adapter_and_projector_are_in_the_dtype_of_the_flags(trained, training):
    dtypes = set(observed(trained(training))["trained"].values())
    assert dtypes == {torch.bfloat16 if "bfloat16" in training else torch.float32}


def test_saved_configurations_say_nothing_of_quantization(trained, training):
    folder = trained(training)
    for place in (folder, folder / "checkpoint-2"):
        config = json.loads((place / "config.json").read_text())
        assert config["model_type"] == "llava_llama" and "quantization_config" not in config


def load(folder, base, bits):
    from llava.model.builder import load_pretrained_model

    how = {"load_4bit": bits == 4, "load_8bit": bits == 8}
    return load_pretrained_model(str(folder), base, "llava-lora", device="cpu", device_map="cpu", **how)


def base_of(inputs):
    return inputs[0].split("=")[1]


def ask(model):
    ids = torch.tensor([[1, 5, -200, 7, 8, 9]])
    images = torch.rand(1, 3, 16, 16).half()
    with torch.inference_mode():
        logits = model(input_ids=ids, images=images).logits
        return logits, model.generate(ids, images=images, do_sample=False, max_new_tokens=4, pad_token_id=0)


@pytest.mark.parametrize("bits", STORED_AS)
def test_result_loads_on_a_base_of_any_bits_and_generates(trained, training, inputs, patched, bits):
    folder = trained(training)
    _, model, _, _ = load(folder, base_of(inputs), bits)
    logits, generated = ask(model)
    assert logits.isfinite().all() and generated.shape[0] == 1
    projection = model.get_model().layers[0].self_attn.q_proj
    if "LoRA" in training:
        assert not isinstance(model, PeftModel)  # merged, as upstream does
        assert type(projection) is STORED_AS[bits]
    else:
        assert len(layers(model)) == 14 and type(projection.base_layer) is STORED_AS[bits]
        saved = load_file(folder / "adapter_model.safetensors")
        name = "base_model.model.model.layers.0.self_attn.q_proj.mixlora_A"
        assert torch.equal(projection.mixlora_A["default"].float(), saved[name].float())


@pytest.mark.parametrize("bits", STORED_AS)
def test_projector_is_the_trained_one_in_16_bits(trained, training, inputs, patched, bits):
    folder = trained(training)
    _, model, _, _ = load(folder, base_of(inputs), bits)
    saved = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    projector = model.get_model().mm_projector.state_dict()
    assert len(projector) == 4
    for name, tensor in projector.items():
        assert torch.equal(tensor, saved[f"base_model.model.model.mm_projector.{name}"].half())


def refused(*flags, **variables):
    done = subprocess.run([*ALONE, *flags], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_other_bits_are_one_line(inputs, tmp_path):
    line = refused(*inputs, f"--output_dir={tmp_path}", "--bits=3", "--lora_enable=True")
    assert line.startswith("llava-mixlora: error: --bits 3: expected 4 or 8")


def test_missing_bitsandbytes_is_one_line(inputs, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['bitsandbytes'] = None\n")
    flags = [*inputs, f"--output_dir={tmp_path}", "--bits=4", "--mixlora_enable=True"]
    line = refused(*flags, PYTHONPATH=str(tmp_path))
    assert "--bits 4" in line and "pip install 'llava-mixlora[qlora]'" in line
