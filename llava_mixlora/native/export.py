"""`llava-mixlora export-hf`: a LLaVA and its adapter as transformers' `LlavaForConditionalGeneration` takes them.

The checkpoint is for programs that know no upstream LLaVA: transformers' own classes, TRL, vLLM. Weights are copied
under other names, tensor by tensor, so it takes the memory of one file of weights.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import ChainMap
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from tqdm import tqdm
from transformers import __version__ as TRANSFORMERS
from transformers.models.llava import modeling_llava

from .. import patches
from ..adapters.adapter_folder import INPUT_EMBEDDINGS, is_adapter
from ..adapters.adapter_record import AdapterRecord, KnownModel, known_model, read_record
from ..adapters.base_check import check_base, check_tower
from ..adapters.fingerprints import fingerprint
from ..adapters.its_llava import use_its_llava
from ..adapters.llava_config import as_data
from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..adapters.model_folders import base_folder, check_output, check_room, new_folder
from ..adapters.model_places import adapter_of, base_model_of, vision_tower_of
from ..adapters.reading import Adapter, read
from ..adapters.shards import write_shards
from ..adapters.stored_weights import StoredWeights, weight_files
from ..errors import MixLoraError
from ..inference.conversation import conversation_of
from ..inference.model_flags import add_model_flags, choices_of
from ..inputs import check_model_path, read_json
from ..method.model_card import write_card
from ..method.stored_tensors import allowing_incomplete
from ..method.tensor_names import PEFT_PREFIX
from ..writing import save_tensors
from .form import check_can_be_native, check_can_be_renamed, native_config, vision_config
from .names import NATIVE_LAYER, native_name, native_patterns, native_saved, targets_of
from .native_card import native_record
from .processor import TEMPLATE, ImageToken, check_prompts, write_processor
from .tensors import BY_TOKEN, EMBEDDINGS, TOWER, grown, native_tensors, of_whole_model, tower_tensors

FLAG = "--save-model-path"
ADAPTER_FOLDER = "adapter"
GENERATION = "generation_config.json"
OLDEST = "4.52"
"""transformers' first version whose LLaVA has the names of [`names`] and a processor that counts as upstream does."""
BESIDE_THE_WEIGHTS = 64 << 20  # bytes: tokenizer and configuration, generously


def add_export_hf(parser: argparse.ArgumentParser) -> None:
    """Describe the command `export-hf` to its parser."""
    parser.description = (
        "Write a LLaVA as transformers' own LlavaForConditionalGeneration, with processor and chat template. Of an "
        f"adapter its base is written, with the projector of its training, and the adapter into the folder "
        f"{ADAPTER_FOLDER} in it; of a merged checkpoint, or any other LLaVA, the whole model. Logits and answers stay "
        "the same."
    )
    parser.epilog = "example: llava-mixlora export-hf --model-path output/llava-mixlora --save-model-path llava-hf"
    parser.add_argument("--model-path", required=True, metavar="MODEL", help="folder of an adapter or of a whole LLaVA")
    parser.add_argument("--model-base", metavar="BASE", help="an adapter's base (default: the one that it names)")
    parser.add_argument(FLAG, required=True, metavar="OUT", help="new folder for the result")
    parser.add_argument("--version", help="conversation template (default: as in the run, or v1)")
    add_model_flags(parser)
    parser.set_defaults(command=_export_hf)


def _export_hf(given: argparse.Namespace) -> None:
    output = Path(given.save_model_path)
    export_hf(given.model_path, output, given.model_base, given.version, choices_of(given))
    print(f"Wrote {output}, a LlavaForConditionalGeneration: AutoProcessor and from_pretrained load it.")
    if is_adapter(folder := output / ADAPTER_FOLDER):
        how = ", with a README on how to load it" if (folder / "README.md").is_file() else ""
        print(f"It is the adapter's base. The adapter is in {folder}{how}.")


def export_hf(
    model_path: str | Path,
    output: str | Path,
    model_base: str | None = None,
    version: str | None = None,
    choices: ModelChoices = AS_NAMED,
) -> None:
    """Write `output`, a checkpoint of transformers' LLaVA, and in its folder `adapter` the adapter, if it is one.

    Args:
        model_path: an adapter of upstream's LLaVA, MIXLORA or a plain LoRA, or a whole LLaVA; a folder or a hub name.
        output: a new folder.
        model_base: the adapter's base; by default the one that it names.
        version: the conversation template; by default that of the training.
        choices: what the user says of the model's parts.

    Raises:
        MixLoraError: it is of a form that transformers' class does not compute, quantized, or incomplete, its
            conversation template cannot be a chat template, or `output` is there. No folder appears then.
    """
    _check_transformers()
    check_model_path("--model-path", str(model_path))
    folder, output = Path(adapter_of(str(model_path))), Path(output)
    check_output(FLAG, output)
    with allowing_incomplete(choices.allow_incomplete):
        source = _source(folder, model_base, choices)
    use_its_llava(folder)
    patches.apply()  # without them LLaVA, whose prompts are compared, cannot be imported
    template = conversation_of(folder, version, "--version", otherwise=TEMPLATE)
    stored, tower = source.stored, Path(source.tower)
    vision = vision_config(source.tower)
    files = [*weight_files(source.base), *([] if source.has_own_tower else weight_files(tower))]
    check_room(FLAG, output, sum(file.stat().st_size for file in files) + BESIDE_THE_WEIGHTS)
    embeddings = source.beside.get(EMBEDDINGS, stored.get(EMBEDDINGS))
    if embeddings is None or not embeddings.is_floating_point():
        raise MixLoraError(
            f"{source.base}: its {EMBEDDINGS} is {'absent' if embeddings is None else embeddings.dtype}; expected a "
            "language model in 16 or 32 bits, so pass the unquantized base as --model-base"
        )
    with new_folder(FLAG, output) as unfinished:
        config, rows = source.config, len(embeddings)
        token = write_processor(source.tokenizer, tower, config, vision.patch_size, template, unfinished, rows)
        native = native_config(config, vision, token.rows, token.token_id, embeddings.dtype)
        native.save_pretrained(unfinished)
        check_prompts(unfinished, source.tokenizer, config, template, native.image_seq_length)
        _write_generation_config(native, token, rows, source.base, unfinished)
        tensors = of_whole_model(_tensors(source, token), native, source.base)
        write_shards(_with_progress(tensors), unfinished)
        _record(source, template, folder).save(unfinished)
        if source.adapter is not None:
            _write_adapter(source, token, unfinished / ADAPTER_FOLDER, output.absolute(), template)


class _Source:
    """What is exported: a base, its configuration and tower, and the adapter, or None."""

    def __init__(self, folder: Path, base: Path, adapter: Adapter | None, config: dict[str, Any], tower: str) -> None:
        self.folder, self.base, self.adapter, self.config, self.tower = folder, base, adapter, config, tower
        self.stored = StoredWeights(base)
        self.beside: Mapping[str, Tensor] = {} if adapter is None else adapter.beside
        # With further tokens, the adapter's own: it lies beside their embeddings.
        self.tokenizer = folder if INPUT_EMBEDDINGS in self.beside else base
        # Upstream looks into the checkpoint for a tower only where it was trained.
        self.has_own_tower = bool(config.get("unfreeze_mm_vision_tower"))


def _source(folder: Path, model_base: str | None, choices: ModelChoices) -> _Source:
    adapter = None
    if is_adapter(folder):
        place = base_model_of(folder, model_base)
        adapter = read(folder, place)
        layers = [name.removeprefix(PEFT_PREFIX) for name in adapter.forms]
        if native := next((name for name in layers if NATIVE_LAYER.match(name)), None):
            raise MixLoraError(
                f"{folder} is an adapter of transformers' own LLaVA already (it holds {native}); llava-mixlora "
                "import-hf makes one of upstream's LLaVA from it"
            )
        check_can_be_renamed(adapter)
        check_base(folder, place, choices.allow_other_base)
        base = base_folder(place)
    elif model_base is not None:
        raise MixLoraError(f"--model-base {model_base}: {folder} is a whole model, which has none; leave it out")
    else:
        base = base_folder(str(folder), "--model-path")
    config = None if adapter is None else adapter.llava
    if config is None:
        config = as_data(read_json(base / "config.json"), base / "config.json")
    check_can_be_native(config, folder)
    named = vision_tower_of(folder, config["mm_vision_tower"], choices.vision_tower, str(base))
    check_tower(folder, named, choices.allow_other_base)
    return _Source(folder, base, adapter, config, str(base_folder(named, "--vision-tower")))


def _check_transformers() -> None:
    if not hasattr(modeling_llava, "LlavaModel"):  # the module `model`, which the names are of
        raise MixLoraError(
            f"transformers {TRANSFORMERS} names the parts of its LLaVA otherwise; export-hf needs {OLDEST} or newer: "
            "run it in an environment that has it, the result needs it too"
        )


def _tensors(source: _Source, token: ImageToken) -> Iterator[tuple[str, Tensor]]:
    language_model = native_tensors(source.stored, source.beside, source.config, token.rows, token.like)
    if source.has_own_tower:
        return chain(language_model, tower_tensors(ChainMap(source.beside, source.stored), source.folder, TOWER))
    return chain(language_model, tower_tensors(StoredWeights(source.tower), source.tower))


def _with_progress(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return tqdm(tensors, desc="Exporting", unit="tensor")


def _write_generation_config(native: Any, token: ImageToken, rows: int, base: Path, folder: Path) -> None:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    told: dict[str, Any] = {name: getattr(native, name) for name in names if getattr(native, name) is not None}
    if (of_base := base / GENERATION).is_file():  # the tokens that end an answer may be more than config.json has
        fields = read_json(of_base)
        told |= {name: fields[name] for name in fields if name != "transformers_version" and not name.startswith("_")}
    if token.token_id >= rows:  # upstream has no such token to write
        told["suppress_tokens"] = [*(told.get("suppress_tokens") or ()), token.token_id]
    (folder / GENERATION).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _record(source: _Source, template: str, folder: Path) -> AdapterRecord:
    """What is known of the training, for the checkpoint: by it import-hf finds the tower."""
    record = read_record(folder) or AdapterRecord()
    tower = record.vision_tower or known_model(source.tower)
    return AdapterRecord(
        conversation=template, vision_tower=tower, images=record.images, data=record.data, merged=record.merged
    )


def _write_adapter(source: _Source, token: ImageToken, folder: Path, base: Path, template: str) -> None:
    """Write the adapter with transformers' names; `base`: where the checkpoint will lie."""
    adapter = source.adapter
    folder.mkdir()
    stored_names = [name.removeprefix(PEFT_PREFIX) for name in adapter.forms]
    marker = ".mixlora_" if adapter.is_mixlora else ".lora_"
    config = copy.copy(adapter.config)
    layers = {name.partition(marker)[0] for name in stored_names if marker in name}
    config.target_modules = targets_of(layers)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for name in ("rank_pattern", "alpha_pattern"):
        setattr(config, name, native_patterns(getattr(config, name, None) or {}, layers))
    config.modules_to_save = [native_saved(module) for module in config.modules_to_save or ()] or None
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, tensor in adapter.tensors():
        inner = name.removeprefix(PEFT_PREFIX)
        if inner in BY_TOKEN:
            tensor = grown(tensor, token.rows, token.like)
        tensors[PEFT_PREFIX + native_name(inner)] = tensor.contiguous()
    save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME)
    if adapter.is_mixlora:
        write_card(config, folder, native_record())
    record = read_record(source.folder) or AdapterRecord()
    known = KnownModel(str(base), True, None, fingerprint(str(folder.parent)))
    AdapterRecord(template, known, record.vision_tower, record.images, record.data).save(folder)
