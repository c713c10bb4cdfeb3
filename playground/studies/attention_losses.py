"""Whether training with flash attention gives the losses that training without it gives.

    python -m playground.studies.attention_losses     # after scripts/finetune_mixlora.sh has made the base

Three short runs of the embedded default with MixLoRA, on the same data in the same order: upstream's `train_mem`, which
asks for flash_attention_2, in bfloat16; `train`, with PyTorch's scaled dot product attention, in bfloat16; and
the latter in float32. What the second and the third differ by is the noise of bfloat16; the first two should differ by
no more. Writes `playground/results/attention_gpu.json` (without a GPU: `attention_cpu.json`), which says what was used.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llava_mixlora import MixLoraError
from llava_mixlora.attention import FLASH, INSTEAD, available_attention
from playground import PLAYGROUND
from playground.atomic import write_json
from playground.base.tiny_base import train
from playground.data.main_job import TRAIN
from playground.embedded_default import IMAGES
from playground.measuring import machine

ADAPTER = {"mixlora_enable": True, "lora_r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "learning_rate": 2e-3}
LOGGED = {"logging_steps": 1, "save_strategy": "no", "seed": 0}
BFLOAT16, FLOAT32 = {"bf16": True, "tf32": False}, {"bf16": False, "tf32": False}


def main() -> int:
    """Command line; returns the exit status, 1 when the losses differ by more than the noise."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.studies.attention_losses", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--cache", type=Path, default=PLAYGROUND / "cache", help="base model and data (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: 60)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples of a step (default: 16)")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    output = arguments.output or PLAYGROUND / "results" / f"attention_{kind}.json"
    cache = arguments.cache.absolute()
    flags = {
        "model_name_or_path": cache / "llava-v1-tiny",
        "data_path": cache / "data" / TRAIN,
        "image_folder": cache / "data" / IMAGES,
        "vision_tower": cache / "tower",
        "per_device_train_batch_size": arguments.batch_size,
    }
    if not (cache / "llava-v1-tiny" / "config.json").is_file():
        print(f"error: {cache} holds no base model; run scripts/finetune_mixlora.sh, or set --cache", file=sys.stderr)
        return 1
    result = compare(flags, arguments.steps)
    device = torch.device("cuda" if kind == "gpu" else "cpu")
    write_json(output, {"machine": machine(device), **result})
    print(
        f"{result['attention']} against {INSTEAD}: losses differ by at most {result['largest_difference']:.2e}; "
        f"{INSTEAD} in bfloat16 against float32: {result['bfloat16_noise']:.2e}\nwritten to {output}"
    )
    return int(result["largest_difference"] > result["bfloat16_noise"])


def compare(flags: dict[str, Any], steps: int) -> dict[str, Any]:
    """The losses of the three runs, and their largest differences; `flags` of train() name the model and the data.

    Raises:
        MixLoraError: a run ended without a loss for each step.
        subprocess.CalledProcessError: a run failed; its messages have been printed.
    """
    on_gpu = torch.cuda.is_available()
    common = {**ADAPTER, **LOGGED, "max_steps": steps, "use_cpu": not on_gpu, **flags}
    flash = _losses("llava.train.train_mem", {**common, **BFLOAT16})
    sdpa = _losses("llava.train.train", {**common, **BFLOAT16})
    exact = _losses("llava.train.train", {**common, **FLOAT32})
    return {
        "steps": steps,
        "attention": available_attention(FLASH, "cuda" if on_gpu else "cpu"),
        "losses": {"train_mem": flash, "train": sdpa, "train in float32": exact},
        "largest_difference": _largest_difference(flash, sdpa),
        "bfloat16_noise": _largest_difference(sdpa, exact),
    }


def _losses(module: str, flags: dict[str, Any]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "llava-mixlora"
        train({**flags, "output_dir": output}, module=module)
        log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if len(losses) != flags["max_steps"]:
        raise MixLoraError(f"{module}: expected a loss for each of {flags['max_steps']} steps, found {len(losses)}")
    return losses


def _largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(a, b))


if __name__ == "__main__":
    sys.exit(main())
