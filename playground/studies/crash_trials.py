"""Kills training with kill -9 at random moments, goes on, and compares the outcome with an uninterrupted run.

    python -m playground.studies.crash_trials python|deepspeed [--trials 20] [--output OUTCOMES.json]

`python` trains in one process, `deepspeed` under ZeRO-2 in two. Needs the cache of the embedded default: run
scripts/finetune_mixlora.sh once. Every second trial waits for a save to begin, so that half of the kills fall into one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from llava_mixlora.training import checkpoint
from playground import PLAYGROUND
from playground.atomic import write_json

STEPS, SAVE_EVERY = 10, 2
LONGEST_STEP, LONGEST_SAVE = 1.0, 0.1  # seconds: how long after its beginning the kill falls, at the most
FLAGS = {
    "mixlora_enable": True,
    "version": "llava_v1",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "bf16": False,
    "learning_rate": 2e-3,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVE_EVERY,
    "save_total_limit": 2,
    "logging_steps": 1,
    "model_max_length": 512,
    "lazy_preprocess": True,
    "group_by_modality_length": True,
    "report_to": "none",
    "use_cpu": True,
}
LAUNCHERS = {
    "python": [sys.executable, "-m", "llava_mixlora"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", "--module", "llava_mixlora"],
}
BATCHES = {
    "python": ["--per_device_train_batch_size=8"],
    "deepspeed": ["--per_device_train_batch_size=4", "--deepspeed", str(PLAYGROUND.parent / "scripts" / "zero2.json")],
}


def main() -> None:
    """Command line: run the trials, print a summary, and put it into the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("launcher", choices=LAUNCHERS, help="one process, or two under ZeRO-2")
    parser.add_argument("--trials", type=int, default=20, help="how many kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=PLAYGROUND / "results" / "crash_trials.json", help="JSON to update"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        summary = run_trials(arguments.launcher, arguments.trials, random.Random(arguments.seed), Path(place))
    stored = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    stored[arguments.launcher] = summary
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, stored)
    print(json.dumps({name: value for name, value in summary.items() if name != "trials"}, indent=1))


def run_trials(launcher: str, trials: int, moments: random.Random, place: Path) -> dict[str, Any]:
    """Kill `trials` times, as often as a run of `STEPS` steps lives for it, then begin the next run."""
    expected = place / "uninterrupted"
    finish(start(launcher, expected))
    kills: list[dict[str, Any]] = []
    differences = []
    progress = tqdm(total=trials, unit="kill")
    while len(kills) < trials:
        output = place / "killed"
        while len(kills) < trials:
            process = start(launcher, output)
            kill = kill_at_random(process, output, in_save=len(kills) % 2 == 1, moments=moments)
            if kill is None:
                break
            kills.append(kill)
            progress.update()
        finish(start(launcher, output))
        differences.append(largest_difference(output, expected))
        shutil.rmtree(output)
    return {
        "kills": len(kills),
        "in_a_step": sum(not kill["in_save"] for kill in kills),
        "in_a_save": sum(kill["in_save"] for kill in kills),
        "lost_steps_at_most": max(kill["lost_steps"] for kill in kills),
        "lost_steps_mean": round(sum(kill["lost_steps"] for kill in kills) / len(kills), 2),
        "runs_compared": len(differences),
        "largest_difference": max(differences),
        "trials": kills,
    }


def start(launcher: str, output: Path) -> subprocess.Popen:
    """Begin a run, or go on with it; its standard output goes to `OUTPUT.log`, once per start."""
    cache = PLAYGROUND / "cache"
    flags = {
        **FLAGS,
        "model_name_or_path": cache / "llava-v1-tiny",
        "data_path": cache / "data" / "train.json",
        "image_folder": cache / "data" / "images",
        "vision_tower": cache / "tower",
        "output_dir": output,
    }
    words = [*LAUNCHERS[launcher], "run", "-m", "llava.train.train", *BATCHES[launcher]]
    words += [f"--{name}={value}" for name, value in flags.items()]
    # One thread, so that a run can be repeated to the bit; unbuffered, so that its log tells the step it is in.
    one_thread = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
    with log_of(output).open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            words, env={**os.environ, **one_thread}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen) -> None:
    """Wait for a run that is to come to its end.

    Raises:
        SystemExit: it failed.
    """
    if process.wait() != 0:
        raise SystemExit(f"a run that was not killed ended with status {process.returncode}")


def kill_at_random(
    process: subprocess.Popen, output: Path, in_save: bool, moments: random.Random
) -> dict[str, Any] | None:
    """Kill all of a run once it has made a few steps; None when it came to its end before."""
    begun, steps = newest(output), moments.randint(1, 5)
    while steps_of(output) < steps or (in_save and not is_saving(output)):
        if process.poll() is not None:
            finish(process)
            return None
        time.sleep(0.002)
    time.sleep(moments.uniform(0, LONGEST_SAVE if in_save else LONGEST_STEP))
    saving = is_saving(output)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = begun + steps_of(output)
    return {"step": reached, "in_save": saving, "lost_steps": max(0, reached - newest(output))}


def largest_difference(output: Path, expected: Path) -> float:
    """Between the adapters and the projectors of two runs."""
    pairs = [
        (load_file(output / "adapter_model.safetensors"), load_file(expected / "adapter_model.safetensors")),
        (torch.load(output / "non_lora_trainables.bin"), torch.load(expected / "non_lora_trainables.bin")),
    ]
    return max(
        float((found[name].double() - wanted[name].double()).abs().max()) for found, wanted in pairs for name in wanted
    )


def newest(output: Path) -> int:
    """The step of the newest checkpoint, 0 when there is none."""
    return max((int(folder.name.partition("-")[2]) for folder in checkpoint.checkpoints(output)), default=0)


def is_saving(output: Path) -> bool:
    """Whether a checkpoint is being written."""
    return checkpoint.unfinished(output).exists()


def steps_of(output: Path) -> int:
    """How many steps the run has logged since it was started."""
    return log_of(output).read_text(encoding="utf-8", errors="replace").count("'loss'")


def log_of(output: Path) -> Path:
    """What the run printed since it was started."""
    return output.with_name(f"{output.name}.log")


if __name__ == "__main__":
    main()
