"""How end-to-end tests run the main job and what belongs to it: the scripts, with a few steps (`TRIAL=1`)."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "finetune_mixlora.sh"
QLORA_SCRIPT = ROOT / "scripts" / "finetune_mixlora_qlora.sh"
MERGE_SCRIPT = ROOT / "scripts" / "merge_mixlora.sh"
EVAL_SCRIPT = ROOT / "scripts" / "eval_mixlora.sh"
GPU_SCRIPT = ROOT / "scripts" / "benchmark_gpu.sh"
SETUP_SCRIPT = ROOT / "scripts" / "setup.sh"
MME_SCRIPT = ROOT / "scripts" / "eval_mme.sh"
TASKS = 15
ONE_STEP = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
ONE_STEP += ["--dataloader_num_workers", "0"]
CACHED = (
    "1/5 pictures and questions: cached",
    "2/5 vision tower: cached",
    "3/5 tokenizer: cached",
    "4/5 base model: cached",
    "5/5 questions of the main job: cached",
)


def environment(place):
    chosen = {"TRIAL": "1", "CACHE_DIR": str(place / "cache"), "OUTPUT_DIR": str(place / "llava-v1-out")}
    return {**os.environ, **chosen, "OMP_NUM_THREADS": "1"}


def finetune(place, *words, script=SCRIPT, **variables):
    return subprocess.run(
        ["bash", str(script), *words],
        env={**environment(place), **variables},
        capture_output=True,
        text=True,
        cwd=place,  # as if called from anywhere
    )
