"""LoRAs of prompts as files: for their user alone, loadable by PEFT, and gone with the process that wrote them."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file

from llava_mixlora.serving.shelf import Keeper, Shelf

LORA = {
    "model.layers.0.self_attn.q_proj": (torch.rand(2, 8), torch.rand(8, 2)),
    "model.layers.0.mlp.up_proj": (torch.rand(3, 8), torch.rand(4, 3)),
}


def test_lora_is_what_peft_reads_and_nobody_else(tmp_path):
    keeper = Keeper()
    shelf = Shelf(keeper, tmp_path)
    one, other = shelf.put(LORA), shelf.put(LORA)
    assert one.name != other.name and len(shelf) == 2
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in (shelf.folder, one, other))
    config = PeftConfig.from_pretrained(str(one))
    assert config.r == 3 and config.rank_pattern == {"model.layers.0.self_attn.q_proj": 2}
    assert set(config.target_modules) == {"q_proj", "up_proj"}
    tensors = load_file(one / "adapter_model.safetensors")
    for name, (down, up) in LORA.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], down)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], up)
    shelf.take_away(one)
    assert len(shelf) == 1
    keeper.close()
    assert not shelf.folder.exists()


HOLDING = """
import subprocess, sys
from pathlib import Path
from llava_mixlora.serving.shelf import Keeper, Shelf
keeper = Keeper()
shelf = Shelf(keeper, Path(sys.argv[1]))
(shelf.folder / "lora").mkdir()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
keeper.say(f"keep-group {child.pid}")
print(shelf.folder, child.pid, flush=True)
sys.stdin.read()
"""


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_process_leaves_neither_folders_nor_processes(tmp_path):
    words = [sys.executable, "-c", HOLDING, str(tmp_path)]
    holding = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    folder, child = holding.stdout.readline().split()
    assert Path(folder, "lora").is_dir() and is_running(child)
    os.kill(holding.pid, signal.SIGKILL)
    holding.communicate()
    until = time.monotonic() + 10
    while Path(folder).exists() or is_running(child):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_is_dropped_is_let_alone(tmp_path):
    keeper = Keeper()
    shelf = Shelf(keeper, tmp_path)
    keeper.say(f"drop {shelf.folder}")
    keeper.close()
    assert shelf.folder.is_dir()
