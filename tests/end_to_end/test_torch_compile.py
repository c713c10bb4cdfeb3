"""`--torch_compile True` trains what is trained without it, with transformers' Trainer and with LLaVA's."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from ..tiny import LINEAR_LAYERS, layers, paper_form, random_ids, randomise
from .training import ALONE, train

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # compiled graphs round in another order


def _losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _samples():
    """Answers behind prompts, of different lengths."""
    for number, length in enumerate((9, 12, 7, 15, 11, 8)):
        ids = random_ids(length, seed=number)
        labels = ids.clone()
        labels[: length // 2] = -100
        yield {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def _run(llama, folder, **flags):
    options = {"target_modules": LINEAR_LAYERS, "task_type": "CAUSAL_LM", "balance_loss_weight": 0.1}
    model = randomise(get_peft_model(llama, paper_form(r=2, num_factors=6, lora_alpha=8, **options)))
    chosen = {"per_device_train_batch_size": 1, "max_steps": 6, "learning_rate": 0.1, "optim": "sgd"}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **chosen, **quiet, **flags)
    trainer = Trainer(model=model, args=arguments, train_dataset=list(_samples()))
    trainer.train()
    counted = [layer.mixlora_stats_usage["default"] for layer in layers(model).values()]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], counted


@pytest.mark.slow
def test_transformers_trainer_compiles(llama, copy_of, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    losses, counted = _run(copy_of(llama), tmp_path / "plain")
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    of_compiled, counted_by_compiled = _run(llama, tmp_path / "compiled", **compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert len(losses) == 6
    assert of_compiled == pytest.approx(losses, rel=1e-3)
    assert all(map(torch.equal, counted_by_compiled, counted))


@pytest.mark.slow
def test_llava_trainer_compiles(inputs, tmp_path):
    flags = ["--mixlora_enable", "True", "--mixlora_num_factors", "8", "--bf16", "False", "--logging_steps", "1"]
    plain = train(ALONE, inputs, tmp_path / "plain", *flags)
    compiling = ["--torch_compile", "True", "--torch_compile_backend", "aot_eager"]
    compiled = train(ALONE, inputs, tmp_path / "compiled", *flags, *compiling)
    assert _losses(tmp_path / "compiled") == pytest.approx(_losses(tmp_path / "plain"), rel=1e-4)
    assert compiled.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, **CLOSE, msg=lambda message, name=name: f"{name}: {message}")
