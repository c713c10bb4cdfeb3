"""The `config.json` of an adapter, as data: what of it reaches transformers selects no code, no kernel and no file.

Adapters come from strangers. transformers takes a configuration at its word: `auto_map` names Python files that it
imports, and an attention implementation with a slash a kernel that it downloads and runs. So only fields that LLaVA and
the model's own configuration know are taken, of a model type that LLaVA has registered, with sizes within bounds.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MixLoraError, printable
from ..inputs import read_json
from ..llava_package import DELAYED, used
from ..method.field_kinds import is_number, is_place, is_whole
from ..own_files import own_file
from .config_file import config_of

FILE = "config.json"
OF_LLAVA = re.compile(r"(?:mm|image|images|tune|freeze|unfreeze|tokenizer|vision|video|frames?|s2)_\w+|use_mm_proj")
"""Fields that LLaVA, or a fork of it, puts into its models' configurations."""
OF_TRANSFORMERS = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "head_dim", "layer_types"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "attention_bias", "attention_dropout", "mlp_bias"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_sequence_length", "pretraining_tp"),
}
"""Fields that some version of transformers writes, and others read under another name."""
SELECTING = {
    *("auto_map", "attn_implementation", "quantization_config", "kernel_config", "use_kernels", "code_revision"),
    *("custom_pipelines", "custom_generate", "trust_remote_code", "name_or_path", "torchscript", "pruned_heads"),
}
"""Fields that choose code, or what is none of an adapter's business; none that begins with _ is taken either."""
KERNELS = ("attn_implementation", "experts_implementation", "kernel")
"""How fields begin that choose implementations."""
LARGEST = {
    "num_hidden_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 24,
    "pretraining_tp": 1 << 10,
    "mm_hidden_size": 1 << 17,
}
"""Of sizes, all whole numbers of at least 1; far above those of any model."""
NUMBER = 1 << 40  # no other number in a configuration is larger
WORD = 4096  # letters of a text
DEEPEST_PROJECTOR = 16
DTYPE = re.compile(r"(?:torch\.)?(?:float16|bfloat16|float32|float64|auto)")
PLAIN = ("llama", "mistral", "qwen2", "mixtral", "gemma", "phi", "phi3")
"""Model types of language models, which some forks leave in the place of their own."""


def read_llava_config(folder: str | Path) -> dict[str, Any] | None:
    """What an adapter's `config.json` says, as far as it is taken; None where there is none.

    Raises:
        MixLoraError: it is damaged, or says what no model has.
    """
    file = own_file(folder, FILE)
    if file is None:
        return None
    fields = read_json(file)
    return as_data(fields, file)


def as_data(fields: dict[str, Any], place: str | Path) -> dict[str, Any]:
    """What the `config.json` of a model says, but for what selects code.

    `place`: the file, for the message.

    Raises:
        MixLoraError: it says what no model has.
    """
    if problem := next(_problems(fields), None):
        raise MixLoraError(f"{place}: {problem}; copy it again")
    return {name: value for name, value in fields.items() if name not in SELECTING and not name.startswith("_")}


def llava_config(folder: str | Path) -> Any:
    """The `transformers` configuration that an adapter's `config.json` describes.

    Raises:
        MixLoraError: as [`read_llava_config`], there is none, or its model type is none of LLaVA's.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file, fields = Path(folder) / FILE, read_llava_config(folder)
    if fields is None:
        raise MixLoraError(f"{file} is missing; the adapter is incomplete, copy it again or train again")
    kind = fields.get("model_type")
    config_class = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    if config_class is None or (not _is_of_llava(config_class) and kind not in PLAIN) or kind.endswith("mpt"):
        why = "MPT is not supported" if str(kind).endswith("mpt") else "code of others is never loaded for it"
        raise MixLoraError(
            f"{file} says model_type={repr(kind)[:100]}, and {why}; expected an adapter of a Llama (llava_llama) or "
            "Mistral (llava_mistral), or another that the LLaVA installed here has"
        )
    known = _fields_of(config_class)
    kept = {name: value for name, value in fields.items() if name in known or OF_LLAVA.fullmatch(name)}
    if dropped := sorted(set(fields) - set(kept) - {"model_type"}):
        shown = ", ".join(dropped[:3]) + (f" and {len(dropped) - 3} others" if len(dropped) > 3 else "")
        note = f"note: {file} has fields that {config_class.__name__} does not know: {shown:.300}"
        print(printable(note), file=sys.stderr)
    try:
        return config_class.from_dict(kept)
    except Exception as error:  # each version of transformers has its own checks
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MixLoraError(f"{file} does not describe a {config_class.__name__} ({reason}); copy it again") from error


def of_a_whole_model(fields: dict[str, Any], has_tower: bool) -> dict[str, Any]:
    """The `config.json` of a whole LLaVA, for its own loader, of that of an adapter of a bare language model.

    Args:
        fields: as [`read_llava_config`] gives them.
        has_tower: whether the checkpoint holds the vision tower.
    """
    found = used().language_model(fields.get("model_type"))
    if found is not None and fields["model_type"] != found[1]:
        fields = {**fields, "model_type": found[1], "architectures": [found[0].name]}
    return {**fields, DELAYED: not has_tower} if used().may_leave_towers_empty else fields


def check_names_no_code(model: str, cache_dir: str | None = None) -> None:
    """Refuse a whole model, or one that only brings a projector, whose `config.json` names a kernel to be downloaded.

    Code that it names in `auto_map` is not run either: see `patches.transformers_code`.

    Raises:
        MixLoraError: names the field.
    """
    for name, value in (config_of(model, cache_dir) or {}).items():
        named = [*value.values()] if isinstance(value, dict) else [value]
        if name.strip("_").startswith(KERNELS) and any("/" in str(each) for each in named):
            raise MixLoraError(
                f"{model}: its config.json says {name}={repr(value)[:100]}, code on the hub; such code is never run: "
                f"remove {name} from it"
            )


def check_is_no_native(model: str, cache_dir: str | None = None) -> None:
    """Refuse a checkpoint of transformers' own LLaVA, which upstream's classes cannot load.

    Raises:
        MixLoraError: says what loads it.
    """
    config = config_of(model, cache_dir) or {}
    if config.get("model_type") == "llava" and config.get("vision_config"):  # that of 2023 is called so too
        raise MixLoraError(
            f"{model} is transformers' own LLaVA, which LlavaForConditionalGeneration loads; upstream's LLaVA "
            "loads the checkpoint that it was exported from, and llava-mixlora import-hf makes an adapter fit that"
        )


def projector_shapes(config: dict[str, Any]) -> dict[str, tuple[int | None, ...]] | None:
    """The shape of each tensor of the projector (`llava.model.multimodal_projector.builder`), by its name inside of it.

    Empty where the model has none, None where its form is not known here.
    """
    if not (config.get("use_mm_proj") or config.get("mm_vision_tower")):
        return {}
    of_words, of_tower = config.get("hidden_size"), config.get("mm_hidden_size")
    kind = config.get("mm_projector_type") or "linear"
    if kind == "identity":
        return {}
    if kind == "linear":
        return {"weight": (of_words, of_tower), "bias": (of_words,)}
    if (match := re.fullmatch(r"mlp(\d+)x_gelu", kind)) is None:
        return None
    layers = range(0, 2 * int(match[1]), 2)
    weights = {f"{place}.weight": (of_words, of_words if place else of_tower) for place in layers}
    return {**weights, **{f"{place}.bias": (of_words,) for place in layers}}


def _problems(fields: dict[str, Any]) -> Iterator[str]:
    for name, largest in LARGEST.items():
        value = fields.get(name)
        if value is not None and not (is_whole(value) and 1 <= value <= largest):
            yield f"{name}={repr(value)[:100]}, expected a whole number from 1 to {largest:,}"
    for name in ("mm_vision_tower", "mm_projector_type", "mm_vision_select_feature", "mm_patch_merge_type"):
        if not (fields.get(name) is None or (isinstance(fields[name], str) and is_place(fields[name]))):
            yield f"{name}={repr(fields[name])[:100]}, expected a name"
    for name in ("dtype", "torch_dtype"):
        if name in fields and not (fields[name] is None or DTYPE.fullmatch(str(fields[name]))):
            yield f"{name}={repr(fields[name])[:100]}, expected a floating-point type"
    depth = re.fullmatch(r"mlp(\d+)x.*", fields.get("mm_projector_type") or "")
    if depth and not (len(depth[1]) < 4 and int(depth[1]) <= DEEPEST_PROJECTOR):
        yield f"mm_projector_type={fields['mm_projector_type'][:100]!r}, expected {DEEPEST_PROJECTOR} layers at most"
    for name, value in fields.items():
        if is_number(value) and abs(value) > NUMBER:
            yield f"{name[:100]}={value:.3g}, which is no size that a model has"
        if isinstance(value, str) and len(value) > WORD:
            yield f"{name[:100]} has {len(value):,} letters, and {WORD:,} at most are read"


def _is_of_llava(config_class: type) -> bool:
    return config_class.__module__.partition(".")[0] == used().name


def _fields_of(config_class: type) -> set[str]:
    """The fields that a configuration class has or takes."""
    taken = set(inspect.signature(config_class.__init__).parameters) | set(config_class().to_dict())
    return (taken | OF_TRANSFORMERS) - SELECTING - {"self", "kwargs", "model_type"}
