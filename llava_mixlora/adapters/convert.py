"""`llava-mixlora convert`: a checkpoint of the authors' released code as a PEFT adapter for upstream LLaVA.

The authors' training (VT-NLP/MixLoRA, `train_cmoa.py`) leaves the state dict of a whole LLaVA, with these tensors
inside every adapted linear layer (E factors per pool, r of them chosen):

    lora_A.default.0 ... E-1                                         [1, d_in]       mixlora_A [E, d_in]
    lora_B.default.0 ... E-1                                         [1, d_out]      mixlora_B [E, d_out]
    cmoa_selector.loraA_selector.weight                              [E, d_in]       mixlora_router_A
    cmoa_selector.loraB_selector.weight                  (IFS)       [E, d_in]       mixlora_router_B
    cmoa_loarB_extra_selector.loraB_selector.weight      (IFS+CFS)   [E, d_in]       mixlora_router_B
    cmoa_loarB_extra_selector.loraA_param2loraB_selector.weight      [E, r * d_in]   mixlora_cfs [r, E, d_in]

Everything else in it is either the base model, which stays where it is, or was trained beside the adapter.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from tqdm import tqdm

from ..errors import MixLoraError
from ..inputs import expanded, read_json
from ..limits import limits
from ..method.config import MixLoraConfig
from ..method.field_kinds import is_number, is_whole
from ..method.model_card import write_card
from ..method.stored_tensors import check_finite
from ..method.tensor_names import PEFT_PREFIX
from ..writing import save_tensors
from .adapter_folder import NOT_THE_LANGUAGE_MODEL, write_non_lora_trainables
from .adapter_record import AdapterRecord, known_model
from .llava_card import llava_record
from .model_folders import base_folder, check_output, new_folder
from .pickles import refuse_code
from .stored_weights import StoredWeights, equal_but_for_rounding

ROUTINGS_BY_CONDITION = {"input": "ifs", "input_lora_a_param": "ifs_cfs"}
# Options of the authors' code that change the layer, with the only value that this layer (and the paper) has.
FIXED_OPTIONS = {
    "used_scored_weight": False,
    "add_noise": False,
    "independent_rank": True,
    "mix_loraA": True,
    "ifs_weight": 1,
}
ONLY_THE_AUTHORS_CODE_READS = (
    "attribute_len",
    "cond_type",
    "mix_mm_projector",
    "use_cmoa",
    "use_contrastive_instr_token",
)
ADAPTER_PART = re.compile(r"(.+)\.((?:lora_[AB]|cmoa_selector|cmoa_loarB_extra_selector)\..+)")
FACTOR = re.compile(r"lora_([AB])\.default\.(\d+)")
NOT_NEEDED = re.compile(r"cmoa_attribute_encoder\.|rotary_emb\.inv_freq$")  # unused with these routings; recomputed
TOWER = re.compile(r".*vision_tower\.vision_tower\.(?:vision_model\.)?")
DECODER_LAYER = re.compile(r"model\.layers\.\d+\..+")


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Describe the command `convert` to its parser."""
    parser.description = (
        "Turn a checkpoint of the authors' released code (VT-NLP/MixLoRA) into a PEFT adapter for LLaVA. No pickled "
        "code is executed."
    )
    parser.epilog = (
        "example: llava-mixlora convert their/checkpoint --model-base lmsys/vicuna-7b-v1.3 "
        "--output llava-mixlora-converted"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with pytorch_model.bin and cmoa_args.bin")
    parser.add_argument("--model-base", required=True, metavar="BASE", help="the LLM that training started from")
    parser.add_argument("--output", required=True, metavar="OUT", help="new folder for the adapter")
    parser.add_argument("--vision-tower", metavar="PATH", help="tower to name instead of the checkpoint's")
    parser.set_defaults(command=_convert)


def _convert(given: argparse.Namespace) -> None:
    convert(given.checkpoint, given.model_base, given.output, given.vision_tower)
    print(f"Wrote the adapter to {given.output}. Talk to it, once its base has a tokenizer:")
    print(f"  llava-mixlora run -m llava.serve.cli --model-path {given.output} --image-file IMAGE")


def convert(
    checkpoint: str | Path, model_base: str, output: str | Path, vision_tower: str | None = None
) -> MixLoraConfig:
    """Write `output`: the adapter, `non_lora_trainables.bin` and a `config.json` for LLaVA; all of it or nothing.

    Args:
        checkpoint: the folder that the authors' `train_cmoa.py` wrote.
        model_base: the language model that its training started from; a folder or a hub name.
        vision_tower: takes the place of the tower that the checkpoint's `config.json` names.

    Returns:
        The adapter's configuration, `MixLoraConfig.paper(...)` with the checkpoint's sizes.

    Raises:
        MixLoraError: a file is missing or damaged, the checkpoint uses an option that the layer does not have, its
            pools differ in size, it was trained on another base, or `output` is there already.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_output("--output", output)
    if not checkpoint.is_dir():
        raise MixLoraError(f"{checkpoint}: no such folder; expected a checkpoint of the authors' train_cmoa.py")
    options, llava_config = read_options(checkpoint), read_json(checkpoint / "config.json")
    stored = StoredWeights(checkpoint)
    names = {name.removeprefix(PEFT_PREFIX): name for name in stored}
    layers = _adapted_layers(names, checkpoint)
    base = StoredWeights(base_folder(model_base))
    adapter: dict[str, Tensor] = {}
    for layer, parts in tqdm(layers.items(), desc="Converting", unit="layer"):
        tensors = _layer_tensors(layer, {part: stored[name] for part, name in parts.items()}, options)
        _check_widths(layer, tensors, base, model_base)
        adapter.update({f"{PEFT_PREFIX}{layer}.{name}": tensor for name, tensor in tensors.items()})
    rest = {short: name for short, name in names.items() if not ADAPTER_PART.fullmatch(short)}
    _check_tower(rest, stored, vision_tower or llava_config.get("mm_vision_tower"))
    beside = _trained_beside(rest, stored, base, model_base)
    check_finite([*adapter.items(), *beside.items()], checkpoint)
    config = _adapter_config(options, targets_in(list(layers), base), model_base)
    with new_folder("--output", output) as folder:
        config.save_pretrained(folder)
        save_tensors(adapter, folder / SAFETENSORS_WEIGHTS_NAME)
        write_non_lora_trainables(folder, beside)
        llava_config = _for_upstream(llava_config, model_base, vision_tower)
        (folder / "config.json").write_text(json.dumps(llava_config, indent=2) + "\n", encoding="utf-8")
        write_card(config, folder, llava_record())
        tower = llava_config.get("mm_vision_tower")
        AdapterRecord(base=known_model(model_base), vision_tower=known_model(tower) if tower else None).save(folder)
    return config


@dataclass(frozen=True)
class AuthorsOptions:
    """What the adapter's sizes and routing were, from `cmoa_args`: the authors' names in this project's words."""

    num_factors: int
    r: int
    lora_alpha: float
    lora_dropout: float
    routing: str


def read_options(checkpoint: Path) -> AuthorsOptions:
    """Read `cmoa_args.json`, or `cmoa_args.bin` with nothing but an `argparse.Namespace` of plain values allowed in it.

    Raises:
        MixLoraError: neither is there, it is damaged or holds other objects, or an option cannot be converted.
    """
    file = checkpoint / "cmoa_args.json"
    if file.is_file():
        options = read_json(file)
    else:
        file = checkpoint / "cmoa_args.bin"
        options = _read_namespace(file)
    condition = options.get("cond_type")
    if condition not in ROUTINGS_BY_CONDITION:
        known = " or ".join(map(repr, ROUTINGS_BY_CONDITION))
        raise MixLoraError(f"{file}: cond_type={condition!r} cannot be converted; expected {known}")
    for name, value in FIXED_OPTIONS.items():
        if options.get(name, value) != value:
            raise MixLoraError(f"{file}: {name}={options[name]!r} cannot be converted; expected {value!r}")
    largest = limits().num_factors
    for name in ("n_experts", "n_selected"):
        if not is_whole(options.get(name)) or not 1 <= options[name] <= largest:
            shown = repr(options.get(name))[:100]
            raise MixLoraError(f"{file}: {name}={shown}: expected a whole number from 1 to {largest}; is it damaged?")
    if not is_number(options.get("lora_alpha")):
        raise MixLoraError(f"{file}: lora_alpha={options.get('lora_alpha')!r}: expected a number; is the file damaged?")
    return AuthorsOptions(
        num_factors=options["n_experts"],
        r=options["n_selected"],
        lora_alpha=options["lora_alpha"],
        lora_dropout=options.get("lora_dropout", 0.0),
        routing=ROUTINGS_BY_CONDITION[condition],
    )


def _read_namespace(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise MixLoraError(
            f"{file} is missing, and so is cmoa_args.json; one of them has to say how the adapter routes"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            options = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in many ways
        refuse_code(file)
        raise MixLoraError(
            f"{file} cannot be read: it is damaged, or it holds more than a Namespace, which is never executed "
            f"({type(error).__name__}); write the options as cmoa_args.json instead"
        ) from error
    if not isinstance(options, argparse.Namespace):
        raise MixLoraError(f"{file}: expected an argparse.Namespace, got {type(options).__name__}")
    return vars(options)


def _adapted_layers(names: Mapping[str, str], checkpoint: Path) -> dict[str, dict[str, str]]:
    """By layer: its adapter's parts and the names under which they are stored."""
    layers: dict[str, dict[str, str]] = {}
    for short, name in names.items():
        if match := ADAPTER_PART.fullmatch(short):
            layers.setdefault(match[1], {})[match[2]] = name
    if not layers:
        raise MixLoraError(f"{checkpoint} holds no adapter: no tensor in it is called lora_A or cmoa_selector")
    outside = [layer for layer in layers if not DECODER_LAYER.fullmatch(layer)]
    if outside:
        raise MixLoraError(
            f"{checkpoint}: the adapter of {outside[0]} cannot be converted; expected decoder layers only"
        )
    return layers


def _layer_tensors(layer: str, parts: Mapping[str, Tensor], options: AuthorsOptions) -> dict[str, Tensor]:
    """The layer's parameters under this project's names, in the dtype they are stored in."""
    if "lora_A.default.weight" in parts:
        raise MixLoraError(
            f"{layer} holds a plain LoRA (mix_start_layer), which has no routes; such a checkpoint cannot be converted"
        )
    E, r = options.num_factors, options.r
    pools = {pool: _pool(pool, layer, parts, E) for pool in "AB"}
    d_in = pools["A"].shape[1]
    selector = "cmoa_loarB_extra_selector" if options.routing == "ifs_cfs" else "cmoa_selector"
    tensors = {
        "mixlora_A": pools["A"],
        "mixlora_B": pools["B"],
        "mixlora_router_A": _part("cmoa_selector.loraA_selector.weight", (E, d_in), layer, parts),
        "mixlora_router_B": _part(f"{selector}.loraB_selector.weight", (E, d_in), layer, parts),
    }
    if options.routing == "ifs_cfs":
        cfs = _part("cmoa_loarB_extra_selector.loraA_param2loraB_selector.weight", (E, r * d_in), layer, parts)
        tensors["mixlora_cfs"] = cfs.view(E, r, d_in).transpose(0, 1)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _pool(pool: str, layer: str, parts: Mapping[str, Tensor], E: int) -> Tensor:
    matches = {int(match[2]): part for part in parts if (match := FACTOR.fullmatch(part)) and match[1] == pool}
    if set(matches) != set(range(E)):
        raise MixLoraError(
            f"{layer}: pool {pool} has {len(matches)} factors, but cmoa_args says n_experts={E}; the checkpoint is "
            "incomplete or its files belong to different runs"
        )
    factors = [parts[matches[index]] for index in range(E)]
    if len({factor.shape for factor in factors}) != 1 or factors[0].ndim != 2 or len(factors[0]) != 1:
        shapes = sorted({tuple(factor.shape) for factor in factors})
        raise MixLoraError(
            f"{layer}: the factors of pool {pool} have the shapes {shapes}; expected one shape, [1, width]"
        )
    return torch.cat(factors)


def _part(name: str, shape: tuple[int, int], layer: str, parts: Mapping[str, Tensor]) -> Tensor:
    if name not in parts:
        raise MixLoraError(f"{layer}.{name} is missing; the checkpoint is incomplete or cmoa_args is of another run")
    if tuple(parts[name].shape) != shape:
        raise MixLoraError(
            f"{layer}.{name} has the shape {list(parts[name].shape)}, expected {list(shape)}; the checkpoint is "
            "damaged, or cmoa_args is of another run"
        )
    return parts[name]


def _check_widths(layer: str, tensors: Mapping[str, Tensor], base: StoredWeights, model_base: str) -> None:
    expected = [tensors["mixlora_B"].shape[1], tensors["mixlora_A"].shape[1]]
    found = list(base[f"{layer}.weight"].shape) if f"{layer}.weight" in base else "absent"
    if found != expected:
        raise MixLoraError(
            f"the checkpoint is for another base: it adapts {layer}.weight of shape {expected}, which is {found} in "
            f"{model_base}; pass the --model-base that its training started from"
        )


def _trained_beside(
    rest: Mapping[str, str], stored: StoredWeights, base: StoredWeights, model_base: str
) -> dict[str, Tensor]:
    """What was trained next to the adapter, by the names that LLaVA's `non_lora_trainables.bin` uses.

    That is what the base does not have (the projector), and norms, embeddings and head where they differ from it. The
    matrices inside the decoder layers carry the adapter and were frozen: where they differ, it is another base.
    """
    beside = {}
    for short, name in tqdm(rest.items(), desc="Comparing with the base", unit="tensor"):
        if NOT_NEEDED.search(short) or TOWER.match(short):
            continue
        tensor = stored[name]
        if short in base:
            original = base[short]
            if original.shape != tensor.shape:
                raise MixLoraError(
                    f"the checkpoint is for another base: its {short} has the shape {list(tensor.shape)}, that of "
                    f"{model_base} {list(original.shape)}; pass the --model-base that its training started from"
                )
            if torch.equal(original.to(tensor.dtype), tensor):
                continue
            if DECODER_LAYER.match(short) and tensor.ndim == 2:
                if equal_but_for_rounding(original, tensor):
                    continue
                raise MixLoraError(
                    f"the checkpoint is for another base: its {short} differs from that of {model_base}; pass the "
                    "--model-base that its training started from"
                )
        beside[PEFT_PREFIX + short] = tensor.clone()  # apart from the file's storage, which torch.save would copy whole
    return beside


def _check_tower(rest: Mapping[str, str], stored: StoredWeights, tower: str | None) -> None:
    """Compare with the vision tower where that is a folder here; LLaVA loads it from there, not from the adapter."""
    folder = expanded(tower or "")
    if not tower or not folder.is_dir():
        return
    original = StoredWeights(folder)
    by_inner = {name.removeprefix("vision_model."): name for name in original}  # transformers 5 writes none
    for short, name in rest.items():
        inner = TOWER.sub("", short)
        if inner == short or inner not in by_inner:
            continue
        if not equal_but_for_rounding(original[by_inner[inner]], stored[name]):
            raise MixLoraError(f"{tower} is another vision tower: its {inner} differs from the checkpoint's")


def _adapter_config(options: AuthorsOptions, targets: dict[str, Any], model_base: str) -> MixLoraConfig:
    return MixLoraConfig.paper(
        r=options.r,
        num_factors=options.num_factors,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        routing=options.routing,
        **targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(model_base),
        inference_mode=True,
    )


def targets_in(layers: list[str], base: StoredWeights) -> dict[str, Any]:
    """The configuration fields that name exactly `layers`: by kind where that takes in no other layer of the base."""
    kinds = sorted({layer.rpartition(".")[2] for layer in layers})
    of_these_kinds = {
        layer
        for layer in (name.removesuffix(".weight") for name in base)
        if DECODER_LAYER.fullmatch(layer) and layer.rpartition(".")[2] in kinds
    }
    return {
        "target_modules": kinds if of_these_kinds == set(layers) else layers,
        "exclude_modules": NOT_THE_LANGUAGE_MODEL,
    }


def _for_upstream(llava_config: dict[str, Any], model_base: str, vision_tower: str | None) -> dict[str, Any]:
    kept = {name: value for name, value in llava_config.items() if name not in ONLY_THE_AUTHORS_CODE_READS}
    kept.update(_name_or_path=str(model_base), model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"])
    if vision_tower is not None:
        kept["mm_vision_tower"] = vision_tower
    return kept
