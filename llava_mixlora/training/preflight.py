"""Checks of a training run's inputs, before a model is loaded and minutes are spent."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import get_default_build_root

from ..adapters.llava_config import check_names_no_code
from ..adapters.stored_weights import check_folder_is_no_wrapped_model
from ..errors import MixLoraError
from ..inputs import check_model_path, check_writable, expanded, read_json
from ..shipped import shipped
from .continuing import check_is_no_adapter
from .given_flags import given_flags, is_true, trains_adapter
from .held_out import check_held_out, check_metric
from .run_data import RunData, check_run_data


def check_training_inputs(argv: Sequence[str]) -> RunData | None:
    """Check the flags of `llava.train.train`, and the data of a run that trains an adapter; returns what was read.

    Raises:
        MixLoraError: a file or folder is missing, the data cannot be trained on or is too little for the processes,
            the output cannot be written, or the weights cannot be quantized as asked.
    """
    flags = given_flags(argv)
    check_quantization(flags)
    note_compiler_locks(flags)
    if trains_adapter(flags):
        check_is_no_adapter(flags)
    check_held_out(flags)
    if not trains_adapter(flags):
        return None
    for flag in ("model_name_or_path", "vision_tower"):
        check_model_path(f"--{flag}", flags.get(flag))
    if flags.get("model_name_or_path"):
        check_names_no_code(flags["model_name_or_path"], flags.get("cache_dir"))
        check_folder_is_no_wrapped_model(expanded(flags["model_name_or_path"]))
    if is_true(flags, "mixlora_enable"):
        check_architecture(flags.get("model_name_or_path"))
    projector = flags.get("pretrain_mm_mlp_adapter")
    if projector and not Path(projector).is_file():
        raise MixLoraError(
            f"--pretrain_mm_mlp_adapter {projector}: no such file; expected the projector's .bin "
            "(for LLaVA 1.5: liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5)"
        )
    if not flags.get("data_path"):
        raise MixLoraError("--data_path is missing; expected a JSON file of conversations (LLaVA's docs: 'Data')")
    if not (output := flags.get("output_dir")):
        raise MixLoraError("--output_dir is missing; expected the folder that the adapter and its checkpoints go to")
    data = check_run_data(flags)
    check_metric(flags, data.held_out)
    check_writable(output)
    return data


def check_quantization(flags: Mapping[str, str]) -> None:
    """Refuse `--bits` that upstream would silently ignore, or that would fail once the model is being loaded.

    Raises:
        MixLoraError: `--bits` is not 4, 8 or 16, bitsandbytes is not installed, or DeepSpeed is asked for ZeRO-3.
    """
    bits, deepspeed = flags.get("bits", "16"), flags.get("deepspeed")
    if bits not in ("4", "8", "16"):
        raise MixLoraError(f"--bits {bits}: expected 4 or 8 (a quantized base model), or 16")
    if bits == "16":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MixLoraError(
            f"--bits {bits} needs bitsandbytes, which is not installed: pip install 'llava-mixlora[qlora]'"
        )
    if deepspeed and zero_stage(deepspeed) == 3:
        raise MixLoraError(
            f"--bits {bits} with --deepspeed {deepspeed}: ZeRO-3 cannot partition quantized weights; "
            f"expected a configuration of ZeRO stage 2, such as {shipped('zero2.json')}, or --bits 16"
        )


def zero_stage(deepspeed_config: str) -> Any:
    """The stage of ZeRO that a file of DeepSpeed's settings asks for; None where it asks for none.

    Raises:
        MixLoraError: there is no such file, or it is not JSON.
    """
    if not Path(deepspeed_config).is_file():
        raise MixLoraError(
            f"--deepspeed {deepspeed_config}: no such file; expected a JSON file like {shipped('zero2.json')}"
        )
    zero = read_json(Path(deepspeed_config)).get("zero_optimization")
    return zero.get("stage") if isinstance(zero, dict) else None


def note_compiler_locks(flags: Mapping[str, str]) -> None:
    """Name the locks that PyTorch's compiler of extensions, which DeepSpeed uses, waits for without a word.

    A process that is killed while it compiles leaves its lock behind, and every later run waits for ever.
    """
    if "deepspeed" not in flags:
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.glob("**/lock")):
        print(f"note: {lock} exists: something is compiling for DeepSpeed, or was killed while it did; then remove it")


def check_architecture(model: str | None) -> None:
    """Refuse an MPT model, and a model that `llava.train.train` takes for one by its name.

    Raises:
        MixLoraError: `model` (`--model_name_or_path`) contains "mpt", or its `config.json` says that it is one.
    """
    if not model:
        return
    file = expanded(model) / "config.json"
    kind = read_json(file).get("model_type") if file.is_file() else None
    if kind in ("mpt", "llava_mpt"):
        raise MixLoraError(
            f"--model_name_or_path {model}: an MPT model (model_type {kind!r}), which --mixlora_enable does not "
            "support; expected a Llama, Vicuna or Mistral, or no --mixlora_enable"
        )
    if "mpt" in model:
        raise MixLoraError(
            f"--model_name_or_path {model}: LLaVA takes a model with 'mpt' in its path for an MPT model, which "
            "--mixlora_enable does not support; expected a Llama, Vicuna or Mistral, under a path without these letters"
        )
