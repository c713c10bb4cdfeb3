"""What end-to-end tests train on."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from ..conftest import PACKABLE_LLAMA
from .main_job import finetune
from .training import write_inputs

STARTED = time.time()
ANSWER = "red"  # always: the loss is a mean over tokens, and halves of a batch must have equally many


@pytest.fixture(scope="module", autouse=True)
def no_shared_memory_left():
    """DeepSpeed on the CPU leaves 138 MB of it behind with every run, which fills a small machine's memory in a day."""
    yield
    mapped = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # another user's, or ended meanwhile
            mapped.append(maps.read_text())
    for buffer in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
        with suppress(OSError):
            if buffer.stat().st_mtime > STARTED and not any(buffer.name in each for each in mapped):
                buffer.unlink()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, _llava, clip_folder, tokenizer_folder):
    """A random LLaVA and eight pictures with a question each, as flags of llava.train.train for two short steps."""
    torch.manual_seed(4)
    llava = type(_llava)(type(_llava.config)(**{**_llava.config.to_dict(), **PACKABLE_LLAMA}))
    flags = write_inputs(tmp_path_factory.mktemp("inputs"), llava, clip_folder, tokenizer_folder, 8 * [ANSWER])
    optimizer = ["--optim=sgd", "--learning_rate=1.0"]  # Adam makes full steps of what is rounding noise in a gradient
    return [*flags, *optimizer, "--max_steps=2", "--evaluation_strategy=no", "--save_strategy=no"]


@pytest.fixture(scope="session")
def main_job(tmp_path_factory):
    """A place in which the main job has run once, for all processes that share the tests, and what it printed."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    place, printed = shared / "main-job", shared / "main-job.txt"
    with FileLock(shared / "main-job.lock"):
        if not printed.is_file():
            place.mkdir(exist_ok=True)
            done = finetune(place, "ifs", "8", "2")
            assert done.returncode == 0, done.stdout + done.stderr
            printed.write_text(done.stdout)
    return place, printed.read_text()
