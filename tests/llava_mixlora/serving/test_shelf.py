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

from ...tiny import message_of

LORA = {
    "model.layers.0.self_attn.q_proj": (torch.rand(2, 8), torch.rand(8, 2)),
    "model.layers.0.mlp.up_proj": (torch.rand(3, 8), torch.rand(4, 3)),
}


def test_lora_is_what_peft_reads_and_nobody_else(tmp_path):
    keeper = Keeper()
    shelf = Shelf(keeper, tmp_path)
    one, other = shelf.new(), shelf.new()
    shelf.put(one, LORA)
    shelf.put(other, LORA)
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
share = "import time; from multiprocessing.shared_memory import SharedMemory as S; s = S(create=True, size=99); "
share += "print(s.name, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", share], start_new_session=True, stdout=subprocess.PIPE, text=True)
keeper.say(f"keep-group {child.pid}")
print(shelf.folder, child.pid, child.stdout.readline(), flush=True)
sys.stdin.read()
"""


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_process_leaves_no_folders_processes_or_shared_memory(tmp_path):
    words = [sys.executable, "-c", HOLDING, str(tmp_path)]
    holding = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    folder, child, name = holding.stdout.readline().split()
    shared = Path("/dev/shm", name)
    assert Path(folder, "lora").is_dir() and is_running(child) and shared.is_file()
    os.kill(holding.pid, signal.SIGKILL)
    holding.communicate()
    until = time.monotonic() + 10
    while Path(folder).exists() or is_running(child) or shared.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_place_where_nothing_can_be_written_is_named(tmp_path):
    keeper = Keeper()
    assert f"--lora-folder {tmp_path / 'none'}" in message_of(Shelf, keeper, tmp_path / "none")
    keeper.close()


def test_what_is_dropped_is_let_alone(tmp_path):
    keeper = Keeper()
    shelf = Shelf(keeper, tmp_path)
    keeper.say(f"drop {shelf.folder}")
    keeper.close()
    assert shelf.folder.is_dir()
