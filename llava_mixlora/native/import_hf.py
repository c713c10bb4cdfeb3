"""`llava-mixlora import-hf`: an adapter of transformers' `LlavaForConditionalGeneration` as one of upstream's LLaVA."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from tqdm import tqdm

from ..adapters.adapter_folder import write_non_lora_trainables
from ..adapters.adapter_record import AdapterRecord, known_model, read_record
from ..adapters.config_file import absolute
from ..adapters.convert import targets_in
from ..adapters.llava_card import llava_record
from ..adapters.llava_config import as_data, check_is_no_native
from ..adapters.model_folders import base_folder, check_output, new_folder
from ..adapters.model_places import adapter_of, base_model_of, vision_tower_of
from ..adapters.reading import Adapter, read
from ..adapters.stored_weights import StoredWeights, equal_but_for_rounding
from ..errors import MixLoraError
from ..inputs import check_model_path, expanded, read_json
from ..method.model_card import write_card
from ..method.tensor_names import PEFT_PREFIX
from ..writing import save_tensors
from .form import FEATURES, LANGUAGE_MODELS, MODEL, ONE_LAYER, TWO_LAYERS, check_can_be_renamed
from .names import MODULE, OF_LAYER, module_name, upstream_name, upstream_patterns, upstream_saved
from .tensors import BY_TOKEN, NOT_NEEDED, PROJECTOR, tower_tensors

FLAG = "--save-model-path"


def add_import_hf(parser: argparse.ArgumentParser) -> None:
    """Describe the command `import-hf` to its parser."""
    parser.description = (
        "Turn an adapter that was trained on transformers' own LlavaForConditionalGeneration into one for upstream's "
        "LLaVA, with the projector of its base beside it: what export-hf does, the other way round."
    )
    parser.epilog = (
        "example: llava-mixlora import-hf --model-path llava-hf/adapter --model-base liuhaotian/llava-v1.5-7b "
        "--save-model-path output/llava-mixlora"
    )
    parser.add_argument("--model-path", required=True, metavar="ADAPTER", help="folder of the adapter, or its hub name")
    parser.add_argument(
        "--model-base",
        required=True,
        metavar="LLAVA",
        help="upstream's LLaVA, or language model, with the same weights",
    )
    parser.add_argument(FLAG, required=True, metavar="OUT", help="new folder for the result")
    parser.add_argument(
        "--native-base", metavar="BASE", help="transformers' LLaVA that it was trained on (default: the one it names)"
    )
    parser.add_argument(
        "--vision-tower", metavar="PATH", help="the vision tower for upstream (default: the one of LLAVA, or on record)"
    )
    parser.set_defaults(command=_import_hf)


def _import_hf(given: argparse.Namespace) -> None:
    import_hf(given.model_path, given.save_model_path, given.model_base, given.native_base, given.vision_tower)
    print(f"Wrote the adapter to {given.save_model_path}. Talk to it:")
    print(f"  llava-mixlora run -m llava.serve.cli --model-path {given.save_model_path} --image-file IMAGE")


def import_hf(
    model_path: str | Path,
    output: str | Path,
    model_base: str,
    native_base: str | None = None,
    vision_tower: str | None = None,
) -> None:
    """Write `output`: the adapter by upstream's names, the projector beside it, and a `config.json` for LLaVA.

    Args:
        model_path: a MIXLORA adapter of transformers' LLaVA; a folder or a hub name.
        output: a new folder.
        model_base: upstream's LLaVA, or its language model, with the weights of the adapter's base.
        native_base: the adapter's base; by default the one that it names.
        vision_tower: the tower that upstream shall load; by default that of `model_base`, or the one on record.

    Raises:
        MixLoraError: it is no such adapter, it adapts what upstream trains in full, its base is another model than
            `model_base`, no tower is known, or `output` is there. No folder appears then.
    """
    check_model_path("--model-path", str(model_path))
    folder, output = Path(adapter_of(str(model_path))), Path(output)
    check_output(FLAG, output)
    adapter = read(folder)
    check_can_be_renamed(adapter)
    layers = _adapted_layers(adapter)
    place = base_folder(base_model_of(folder, native_base, "--native-base"), "--native-base")
    native = as_data(read_json(place / "config.json"), place / "config.json")
    if native.get("model_type") != MODEL:
        raise MixLoraError(
            f"{place}: model_type={repr(native.get('model_type'))[:100]}; expected transformers' own LLaVA ({MODEL}), "
            "which the adapter was trained on; pass it as --native-base"
        )
    base = base_folder(model_base)
    check_is_no_native(str(base))
    of_base = as_data(read_json(base / "config.json"), base / "config.json")
    of_native, stored = StoredWeights(place), StoredWeights(base)
    tower = _tower_of(place, base, of_base, vision_tower)
    _check_tower(of_native, place, tower)
    config = _llava_config(native, of_base, tower, place)
    in_adapter = {upstream_name(name.removeprefix(PEFT_PREFIX)): tensor for name, tensor in _further(adapter)}
    trained = {name: tensor for name, tensor in in_adapter.items() if name.startswith(PROJECTOR)}
    beside = {**_beside(of_native, stored, place, model_base), **trained}
    if config["mm_projector_type"] == ONE_LAYER:
        beside = _as_one_layer(beside)
    with new_folder(FLAG, output) as unfinished:
        written = _write_adapter(adapter, layers, stored, model_base, unfinished)
        write_non_lora_trainables(unfinished, {PEFT_PREFIX + name: tensor for name, tensor in beside.items()})
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if adapter.is_mixlora:
            write_card(written, unfinished, llava_record())
        _record(folder, model_base, config).save(unfinished)


def _adapted_layers(adapter: Adapter) -> list[str]:
    """Upstream's names of the layers, which are all of the decoder."""
    marker = ".mixlora_" if adapter.is_mixlora else ".lora_"
    names = [name.removeprefix(PEFT_PREFIX) for name in adapter.forms]
    layers = sorted({name.partition(marker)[0] for name in names if marker in name})
    for layer in layers:
        if OF_LAYER.fullmatch(layer):
            raise MixLoraError(f"{adapter.folder} is an adapter of upstream's LLaVA already (it adapts {layer})")
        if not MODULE.fullmatch(layer) or not OF_LAYER.fullmatch(upstream_name(layer)):
            raise MixLoraError(
                f"{adapter.folder} adapts {layer}, which is in no decoder of a LLaVA; expected layers like "
                "model.language_model.layers.0.mlp.up_proj"
            )
    return [upstream_name(layer) for layer in layers]


def _further(adapter: Adapter) -> list[tuple[str, Tensor]]:
    """What was trained beside the pools and is stored with them: modules to save, biases."""
    return [(name, tensor) for name, tensor in adapter.tensors() if ".mixlora_" not in name and ".lora_" not in name]


def _tower_of(place: Path, base: Path, of_base: Mapping[str, Any], vision_tower: str | None) -> str:
    record = read_record(place)
    recorded = None if record is None or record.vision_tower is None else record.vision_tower.name_or_path
    named = of_base.get("mm_vision_tower") or recorded
    if not (vision_tower or named):
        raise MixLoraError(
            f"neither --model-base nor {place} names a vision tower that upstream's LLaVA can load; pass --vision-tower"
        )
    return vision_tower_of(base, named, vision_tower)


def _check_tower(native: StoredWeights, place: Path, tower: str) -> None:
    """Compare towers where upstream's is a folder here; it loads its tower from there, not from the adapter."""
    folder = expanded(tower)
    if not folder.is_dir():
        return
    by_module = {module_name(name): name for name in native}
    for name, tensor in tower_tensors(StoredWeights(folder), tower):
        other = by_module.get(module_name(name))
        if other is not None and not equal_but_for_rounding(tensor, native[other]):
            raise MixLoraError(
                f"{place}, which the adapter was trained on, has another vision tower than {tower}: {name} differs; "
                "pass the tower that it was exported with as --vision-tower"
            )


def _check_can_be_upstreams(native: Mapping[str, Any], place: Path) -> None:
    possible: dict[str, Callable[[Any], bool]] = {
        "projector_hidden_act": lambda value: value in ("gelu", "linear"),
        "multimodal_projector_bias": lambda value: value is True,
        "vision_feature_layer": lambda value: type(value) is int,
        "vision_feature_select_strategy": lambda value: value in FEATURES.values(),
    }
    for name, is_possible in possible.items():
        if name in native and not is_possible(native[name]):
            raise MixLoraError(
                f"{place}: {name}={repr(native[name])[:100]}, of which upstream's LLaVA knows nothing; an adapter of "
                "this model cannot be one of upstream's"
            )


def _llava_config(native: Mapping[str, Any], of_base: Mapping[str, Any], tower: str, place: Path) -> dict[str, Any]:
    """Upstream's `config.json`: the language model's fields as the base has them, and LLaVA's."""
    text, vision = native.get("text_config") or {}, native.get("vision_config") or {}
    kinds = {of_text: of_llava for of_llava, of_text in LANGUAGE_MODELS.items()}
    kind = text.get("model_type", "llama")
    if kind not in kinds:
        raise MixLoraError(f"{place}: its language model is a {kind}; expected one of {', '.join(kinds)}")
    _check_can_be_upstreams(native, place)
    classes = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM", "qwen2": "LlavaQwenForCausalLM"}
    features = {of_transformers: of_llava for of_llava, of_transformers in FEATURES.items()}
    processing = place / "preprocessor_config.json"
    pads = bool(read_json(processing).get("do_pad")) if processing.is_file() else False
    fields = {
        "model_type": kinds[kind],
        "architectures": [classes[kind]],
        "mm_vision_tower": tower,
        "mm_hidden_size": vision.get("hidden_size", of_base.get("mm_hidden_size", 1024)),
        "mm_projector_type": ONE_LAYER if native.get("projector_hidden_act") == "linear" else TWO_LAYERS,
        "mm_vision_select_layer": native.get("vision_feature_layer", -2),
        "mm_vision_select_feature": features[native.get("vision_feature_select_strategy", "default")],
        "mm_use_im_start_end": bool(of_base.get("mm_use_im_start_end")),
        "mm_use_im_patch_token": bool(of_base.get("mm_use_im_patch_token")),
        "image_aspect_ratio": "pad" if pads else "square",
        "use_mm_proj": True,
    }
    return {**of_base, **fields}


def _beside(native: StoredWeights, stored: StoredWeights, place: Path, model_base: str) -> dict[str, Tensor]:
    """By upstream's names, what the adapter's base has and `model_base` has not: the projector always, and norms and

    biases where they differ. Matrices are frozen: where they differ, or a layer has no counterpart, it is another base.
    """

    def other_base(name: str) -> MixLoraError:
        return MixLoraError(
            f"{place}, which the adapter was trained on, is another model than {model_base}: {name} differs; pass "
            "the LLaVA or language model that it was exported from as --model-base"
        )

    beside = {}
    shorts = {upstream_name(module_name(name)) for name in native}
    if alone := next((name for name in sorted(shorts ^ {*stored}) if _is_of_decoder(name)), None):
        raise other_base(alone)
    for name in tqdm(native, desc="Comparing with the base", unit="tensor"):
        short = upstream_name(module_name(name))
        if short.startswith(PROJECTOR):
            beside[short] = native[name]
        if short not in stored or short.startswith(PROJECTOR):
            continue
        tensor, original = native[name], stored[short]
        if short in BY_TOKEN:
            tensor = tensor[: len(original)]  # further rows are of tokens that only transformers' class needs
        if equal_but_for_rounding(original, tensor):
            continue
        if tensor.shape != original.shape or tensor.ndim == 2:
            raise other_base(short)
        beside[short] = tensor
    if not any(name.startswith(PROJECTOR) for name in beside):
        raise MixLoraError(f"{place} holds no projector; expected the weights of transformers' own LLaVA")
    return {name: tensor.clone() for name, tensor in beside.items()}


def _is_of_decoder(name: str) -> bool:
    return OF_LAYER.fullmatch(name) is not None and not name.endswith(NOT_NEEDED)


def _as_one_layer(beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two layers of a projector between which nothing happens as the one that upstream has."""
    first, second = ([beside[f"{PROJECTOR}{place}.{part}"].float() for part in ("weight", "bias")] for place in "02")
    one = {"weight": second[0] @ first[0], "bias": second[0] @ first[1] + second[1]}
    dtype = beside[f"{PROJECTOR}0.weight"].dtype
    rest = {name: tensor for name, tensor in beside.items() if not name.startswith(PROJECTOR)}
    return {**rest, **{f"{PROJECTOR}{part}": tensor.to(dtype) for part, tensor in one.items()}}


def _write_adapter(
    adapter: Adapter, layers: list[str], stored: StoredWeights, model_base: str, folder: Path
) -> PeftConfig:
    config = copy.copy(adapter.config)
    for name, value in targets_in(layers, stored).items():
        setattr(config, name, value)
    config.layers_to_transform = config.layers_pattern = None
    for name in ("rank_pattern", "alpha_pattern"):
        setattr(config, name, upstream_patterns(getattr(config, name, None) or {}, layers))
    config.modules_to_save = upstream_saved(config.modules_to_save or ()) or None
    config.base_model_name_or_path = absolute(model_base)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, tensor in adapter.tensors():
        short = upstream_name(name.removeprefix(PEFT_PREFIX))
        if short.startswith(PROJECTOR):
            continue
        if short in BY_TOKEN:
            tensor = tensor[: len(stored[short])]
        tensors[PEFT_PREFIX + short] = tensor.contiguous()
    save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME)
    return config


def _record(folder: Path, model_base: str, config: Mapping[str, Any]) -> AdapterRecord:
    record = read_record(folder) or AdapterRecord()
    return AdapterRecord(
        record.conversation,
        known_model(model_base),
        known_model(config["mm_vision_tower"]),
        record.images,
        record.data,
    )
