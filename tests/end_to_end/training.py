"""How end-to-end tests start upstream's training: in processes of their own, with one thread each."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

SCRIPTS = Path(__file__).parents[2] / "scripts"
RUN = ["run", "-m", "llava.train.train"]
ALONE = [sys.executable, "-m", "llava_mixlora", *RUN]


def train(launcher, inputs, output, *flags):
    """Run it to its end; returns the adapter's tensors."""
    words = [*launcher, *inputs, "--output_dir", str(output), *flags]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_file(output / "adapter_model.safetensors")


def environment():
    """One thread per process, so that a run can be repeated to the bit; DeepSpeed on the CPU.

    What DeepSpeed compiles stays in the environment that runs the tests: a lock that a killed process has left in the
    user's cache would let them wait for ever.
    """
    chosen = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **chosen, "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions")}


def program(name):
    """A console script of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))
