"""Updates written as a plain LoRA, for PEFT and for LLaVA's own LoRA branch."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..adapters.adapter_folder import INPUT_EMBEDDINGS, TOKENIZER_FILES, write_non_lora_trainables
from ..adapters.adapter_record import RECORD
from ..adapters.llava_config import read_llava_config
from ..method.tensor_names import PEFT_PREFIX
from ..own_files import copy_own
from ..writing import save_tensors
from .static_adapter import SavedAdapter, StaticUpdates


def write_lora(adapter: SavedAdapter, base: str, updates: StaticUpdates, folder: Path) -> None:
    """Write a LoRA adapter of PEFT into `folder`, with LLaVA's files beside it; its scaling is 1."""
    config = adapter.config
    ranks = {layer: len(down) for layer, (down, _) in updates.items()}
    rank = max(ranks.values())
    others = {layer: of_layer for layer, of_layer in ranks.items() if of_layer != rank}
    tensors = {name: tensor.contiguous() for name, tensor in adapter.further_tensors().items()}
    for layer, (down, up) in updates.items():
        tensors[f"{PEFT_PREFIX}{layer}.lora_A.weight"] = down.contiguous()
        tensors[f"{PEFT_PREFIX}{layer}.lora_B.weight"] = up.contiguous()
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        lora_dropout=0.0,
        bias={"mixlora_only": "lora_only"}.get(config.bias, config.bias),
        target_modules=sorted(updates),  # in full: PEFT 0.13 and those before it know no exclude_modules
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME)
    if adapter.beside:  # written anew: what has been read holds no code
        named = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in adapter.beside.items()}
        write_non_lora_trainables(folder, named)
    if (contents := read_llava_config(adapter.folder)) is not None:
        (folder / "config.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    for name in (RECORD, *(TOKENIZER_FILES if INPUT_EMBEDDINGS in adapter.beside else ())):
        copy_own(adapter.folder, name, folder)
