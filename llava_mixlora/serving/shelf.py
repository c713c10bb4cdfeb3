"""The LoRAs of the prompts that are being answered: files in memory that only this user reads, gone with the server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import Tensor

from ..errors import MixLoraError
from ..method.tensor_names import PEFT_PREFIX

IN_MEMORY = Path("/dev/shm")
FLAG = "--lora-folder"


class Keeper:
    """The process that clears up when this one has ended, also by a signal that nobody hears; see [`keeper`]."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py"))]
        # In a session of its own, which Ctrl-C does not reach.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        self._writing = threading.Lock()

    def say(self, line: str) -> None:
        """A line of its language."""
        with self._writing:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Let it clear up now, and wait for it."""
        self._process.stdin.close()
        self._process.wait(30)


class Shelf:
    """A folder of LoRAs, each in a folder of its own.

    Args:
        keeper: clears it up.
        place: where it is made; in memory where that can be.

    Raises:
        MixLoraError: it cannot be made there.
    """

    def __init__(self, keeper: Keeper, place: Path | None = None) -> None:
        can_write = IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK)
        place = place or (IN_MEMORY if can_write else None)
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="llava-mixlora-", dir=place))  # for this user alone
        except OSError as error:
            raise MixLoraError(
                f"{FLAG} {place}: nothing can be written there ({error.strerror}); name another"
            ) from None
        keeper.say(f"keep {self.folder}")

    def new(self) -> Path:
        """Where a LoRA may be written: a folder of a unique name, as engines cache by it."""
        return self.folder / f"prompt-{uuid.uuid4().hex}"

    def put(self, folder: Path, lora: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write a LoRA, by the names of the model that takes it."""
        ranks = {name: len(down) for name, (down, _) in lora.items()}
        rank = max(ranks.values())
        others = {name: of_layer for name, of_layer in ranks.items() if of_layer != rank}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in lora}),
            "inference_mode": True,
        }
        tensors = {}
        for name, (down, up) in lora.items():
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = down.cpu().contiguous()
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = up.cpu().contiguous()
        folder.mkdir(mode=0o700)
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(save(tensors))

    def take_away(self, folder: Path) -> None:
        """Remove a LoRA."""
        shutil.rmtree(folder, ignore_errors=True)

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.iterdir()) if self.folder.is_dir() else 0
