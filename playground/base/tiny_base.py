"""The tiny LLaVA that the embedded default starts from: a small Llama taught to describe the pictures.

Everything is trained here, through upstream's own `llava.train.train`, so that the base behaves like any LLaVA: it
knows what the pictures show, and has never been asked one of the tasks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from playground.atomic import atomic_directory

HIDDEN_SIZE = 256
LAYERS = 4
HEADS = 4
CONTEXT = 512
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
STEPS = 220
# The sequence is that of upstream's CLI, so the answers there are those that were trained for.
VERSION = "llava_v1"


def build(data_dir: Path, tower_dir: Path, tokenizer_dir: Path, output_dir: Path, seed: int = 0, steps: int = STEPS):
    """Train the base on `describe.json` of `data_dir` and write it as a complete LLaVA checkpoint to `output_dir`.

    Raises:
        subprocess.CalledProcessError: training failed; its own messages have been printed.
    """
    with atomic_directory(output_dir, marker="config.json") as folder:
        language_model = folder.parent / "language-model"
        _write_language_model(tokenizer_dir, language_model, seed)
        train(
            {
                "model_name_or_path": language_model,
                "data_path": Path(data_dir) / "describe.json",
                "image_folder": Path(data_dir) / "images",
                "vision_tower": Path(tower_dir).absolute(),
                "output_dir": folder,
                "per_device_train_batch_size": BATCH_SIZE,
                "learning_rate": LEARNING_RATE,
                "max_steps": steps,
                "seed": seed,
            }
        )
        _copy_tokenizer(tokenizer_dir, folder)


def train(flags: dict[str, object], extra: list[str] | None = None, module: str = "llava.train.train") -> None:
    """Run upstream's training through the plugin in a process of its own; `flags` and `extra` are its arguments.

    Raises:
        subprocess.CalledProcessError: the process failed.
    """
    common = {
        "version": VERSION,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square",
        "bf16": False,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "model_max_length": CONTEXT,
        "lazy_preprocess": True,
        "dataloader_pin_memory": False,
    }
    arguments = [f"--{name}={value}" for name, value in {**common, **flags}.items()]
    command = [sys.executable, "-m", "llava_mixlora", "run", "-m", module, *arguments, *(extra or [])]
    # One GPU: where there are several, transformers would spread a batch over them by threads.
    subprocess.run(command, check=True, env={"CUDA_VISIBLE_DEVICES": "0", **os.environ})


def _write_language_model(tokenizer_dir: Path, output_dir: Path, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, use_fast=False)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.unk_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(output_dir)
    _copy_tokenizer(tokenizer_dir, output_dir)


def _copy_tokenizer(tokenizer_dir: Path, output_dir: Path) -> None:
    """Put the files themselves there: saved by transformers 5, a Llama tokenizer forgets that it is a `legacy` one,

    by which LLaVA counts the tokens of a conversation with several turns.
    """
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_dir) / file, output_dir)
    (output_dir / "tokenizer.json").unlink(missing_ok=True)
