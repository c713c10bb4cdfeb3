"""`llava-mixlora merge` and `export-lora`: a static stand-in for an adapter, for programs that know of no MixLoRA.

The base is read tensor by tensor and written shard by shard, so merging takes the memory of one shard and one layer.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..adapters.adapter_folder import (
    INPUT_EMBEDDINGS,
    TOKENIZER_FILES,
    read_config,
)
from ..adapters.adapter_record import read_record
from ..adapters.base_check import record_of_merged
from ..adapters.config_file import absolute
from ..adapters.llava_config import of_a_whole_model, read_llava_config
from ..adapters.loader_branch import branch_of
from ..adapters.loader_names import misleading
from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..adapters.model_folders import new_folder
from ..adapters.model_places import base_model_of
from ..adapters.shards import write_shards
from ..adapters.stored_weights import StoredWeights
from ..data.kept_calibration import KEPT, SAMPLES
from ..errors import MixLoraError
from ..inference.conversation import conversation_of
from ..inference.model_flags import add_model_flags, choices_of
from ..inference.samples import SampleSource
from ..inputs import positive, read_json
from ..llava_package import ORIGINAL, part, used
from ..method.tensor_names import PEFT_PREFIX
from ..own_files import copy_own
from .distillation import STEPS
from .fidelity import LARGEST_KL, REPORT, Fidelity
from .fit import FLAG, check_fits, check_merge
from .for_prompt import export_lora_for_prompt
from .lora_folder import write_lora
from .stand_in import METHODS, TEMPLATE, source_of_kept, static_updates
from .static_adapter import SavedAdapter, StaticUpdates

MADE_FROM = (
    f"It is made from {KEPT}, the samples that the run has kept beside the adapter, or from --calibration DATA; where "
    "there are neither, from the statistics of training."
)


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Describe the command `merge` to its parser."""
    parser.description = (
        "Write the base with a static stand-in for the adapter in it, as a plain LLaVA checkpoint, and report how far "
        f"it is from the dynamic model. {MADE_FROM}"
    )
    parser.epilog = (
        "example: llava-mixlora merge --model-path output/llava-mixlora --model-base liuhaotian/llava-v1.5-7b "
        "--save-model-path llava-merged"
    )
    _add_arguments(parser)
    parser.set_defaults(command=_merge)


def add_export_lora(parser: argparse.ArgumentParser) -> None:
    """Describe the command `export-lora` to its parser."""
    parser.description = (
        "Write a static stand-in for the adapter as a LoRA of rank E, for PEFT and for LLaVA's own LoRA branch, and "
        f"report how far it is from the dynamic model. {MADE_FROM}"
    )
    parser.epilog = (
        "example: llava-mixlora export-lora --model-path output/llava-mixlora --save-model-path llava-exported-lora"
    )
    _add_arguments(parser)
    parser.add_argument(
        "--for-prompt",
        nargs=2,
        metavar=("IMAGE", "QUESTION"),
        help="instead: the exact LoRA, of rank r, of this question about this image, and of its answer",
    )
    parser.set_defaults(command=_export_lora)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, metavar="ADAPTER", help="folder of the MixLoRA adapter")
    parser.add_argument("--model-base", metavar="BASE", help="its base in 16 bits (default: the one that it names)")
    parser.add_argument(FLAG, required=True, metavar="OUT", help="new folder for the result")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="how the static update is chosen: distillation (default where there is data), regression, lstsq (default "
        "without data) or mean; the first two need data",
    )
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help=f"conversations (LLaVA's JSON) to make it from (default: what the run has kept in {KEPT})",
    )
    parser.add_argument(
        "--image-folder", metavar="DIR", help="where the images of the data lie (default: as in the run)"
    )
    parser.add_argument("--task", metavar="NAME", help="only samples of the data whose field 'task' is NAME")
    parser.add_argument("--samples", type=positive, default=SAMPLES, help="how many to draw (default: %(default)s)")
    parser.add_argument("--version", help="conversation template (default: as in the run)")
    parser.add_argument("--batch-size", type=positive, default=8, help="samples at a time (default: 8)")
    parser.add_argument(
        "--steps", type=positive, default=STEPS, help="of distillation, 32 samples each (default: %(default)s)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help=f"write a stand-in whose next tokens diverge by more than {LARGEST_KL} nats",
    )
    add_model_flags(parser)


def _merge(given: argparse.Namespace) -> None:
    merge(given.model_path, given.model_base, given.save_model_path, **_options(given))
    print(f"Wrote {given.save_model_path}, with {REPORT}. {_how_to_load(Path(given.save_model_path))}")


def _how_to_load(merged: Path) -> str:
    model_type = read_json(merged / "config.json").get("model_type")
    elsewhere = misleading(merged, model_type, _name_for_its_loader(model_type))
    if elsewhere is None:
        loads = "LLaVA loads it with no --model-base."
    else:
        loads = f"LLaVA, without the plugin, goes by a folder's name, and {elsewhere}."
    record = read_record(merged)
    template = "that of the training" if record is None or record.conversation is None else record.conversation
    return (
        f"{loads} By the name its programs choose the conversation template too; --conv-mode says {template}, which "
        "llava-mixlora run does by itself."
    )


def _name_for_its_loader(model_type: str | None) -> str | None:
    """A name by which a fork's own loader takes the class of that type; None: of LLaVA, or the name does not decide."""
    model = None if used().name == ORIGINAL else used().language_model(model_type)
    if model is None:
        return None
    branch = branch_of(part("llava.model.builder:load_pretrained_model"), model[0].name)
    return branch.name if branch is not None and branch.name else None


def _export_lora(given: argparse.Namespace) -> None:
    if given.for_prompt is None:
        export_lora(given.model_path, given.model_base, given.save_model_path, **_options(given))
        print(f"Wrote {given.save_model_path}, with {REPORT}. It is a LoRA for the same base.")
    else:
        _export_lora_for_prompt(given)
    print("llava-mixlora export-hf makes it one of transformers' own LLaVA, as vLLM wants.")


def _export_lora_for_prompt(given: argparse.Namespace) -> None:
    of_all = {"--method": given.method, "--calibration": given.calibration, "--task": given.task}
    if of_others := [f"{flag} {value}" for flag, value in of_all.items() if value is not None]:
        raise MixLoraError(
            f"--for-prompt with {of_others[0]}: the LoRA of one prompt is exact, so it is made from no data and by no "
            "method; leave one of them out"
        )
    image, question = given.for_prompt
    if given.image_folder is not None:
        image = str(Path(given.image_folder) / image)
    export_lora_for_prompt(
        given.model_path, given.model_base, given.save_model_path, image, question, given.version, choices_of(given)
    )
    print(f"Wrote {given.save_model_path}, a LoRA for the same base: exact for this prompt and its answer, no other.")


def _options(given: argparse.Namespace) -> dict[str, Any]:
    read_config(given.model_path)  # what is no adapter is named before anything is said of its samples
    of_data = {"image_folder": given.image_folder, "task": given.task}
    of_data |= {"samples": given.samples, "batch_size": given.batch_size}
    if given.calibration is None:
        calibration = source_of_kept(given.model_path, given.method, version=given.version, **of_data)
    else:
        version = conversation_of(given.model_path, given.version, "--version", otherwise=TEMPLATE)
        calibration = SampleSource(given.calibration, version=version, **of_data)
    return {
        "method": given.method,
        "calibration": calibration,
        "choices": choices_of(given),
        "steps": given.steps,
        "force": given.force,
        "tell": lambda fidelity: print("\n".join(fidelity.lines()), flush=True),
    }


def merge(
    model_path: str | Path,
    model_base: str | None,
    output: str | Path,
    method: str | None = None,
    calibration: SampleSource | None = None,
    choices: ModelChoices = AS_NAMED,
    steps: int = STEPS,
    force: bool = False,
    tell: Callable[[Fidelity], None] = lambda fidelity: None,
) -> Fidelity:
    """Write `output`: the base with a static stand-in for the adapter in it, and what was trained beside it.

    Args:
        model_path: the adapter's folder.
        model_base: its base, a folder or a hub name; by default the one that the adapter names.
        output: a new folder; it gets the report too, as `merge_report.json` and `merge_report.png`.
        method: of [`METHODS`]; by default `"distillation"` with calibration data, `"lstsq"` without.
        calibration: what to make the static updates from and to judge them by; [`source_of_kept`] is what the run has
            kept. Without, they are made from the statistics of training, and not judged.
        steps: of `"distillation"`.
        force: write also what is too far from the dynamic model.
        tell: is called with the result's fidelity before anything is written, and before it is refused.
        choices: what the user says of the model's parts.

    Returns:
        How far the result is from the dynamic model.

    Raises:
        MixLoraError: the result is too far from the dynamic model, there are neither statistics nor calibration data,
            the base is another one than the adapter's, the disk is too small, `output` is there, or a file is missing
            or damaged. No folder appears then.
    """
    adapter, output = SavedAdapter(model_path, choices.allow_incomplete), Path(output)
    base = check_merge(adapter, model_base, output, choices)
    updates, fidelity = _judged(adapter, base, method, calibration, choices, steps, force, tell)
    with new_folder(FLAG, output) as folder:
        write_merged(adapter, base, updates, folder, choices.vision_tower)
        fidelity.save(folder)
    return fidelity


def export_lora(
    model_path: str | Path,
    model_base: str | None,
    output: str | Path,
    method: str | None = None,
    calibration: SampleSource | None = None,
    choices: ModelChoices = AS_NAMED,
    steps: int = STEPS,
    force: bool = False,
    tell: Callable[[Fidelity], None] = lambda fidelity: None,
) -> Fidelity:
    """Write `output`: a static stand-in for the adapter as a LoRA of rank E for PEFT and for LLaVA's own LoRA branch.

    Arguments, result and errors are those of [`merge`].
    """
    adapter, output = SavedAdapter(model_path, choices.allow_incomplete), Path(output)
    base = check_merge(adapter, model_base, output, choices, copies_base=False)
    updates, fidelity = _judged(adapter, base, method, calibration, choices, steps, force, tell)
    with new_folder(FLAG, output) as folder:
        write_lora(adapter, base_model_of(adapter.folder, model_base), updates, folder)
        fidelity.save(folder)
    return fidelity


def _judged(
    adapter: SavedAdapter,
    base: Path,
    method: str | None,
    calibration: SampleSource | None,
    choices: ModelChoices,
    steps: int,
    force: bool,
    tell: Callable[[Fidelity], None],
) -> tuple[StaticUpdates, Fidelity]:
    updates, fidelity = static_updates(adapter, base, method, calibration, choices, steps)
    tell(fidelity)
    problem = fidelity.problem()
    if problem is not None and not force:
        raise MixLoraError(problem)
    return updates[fidelity.method], fidelity


def write_merged(
    adapter: SavedAdapter, base: Path, updates: StaticUpdates, folder: Path, vision_tower: str | None = None
) -> None:
    """Write a plain checkpoint into `folder`: the base with `updates` in it, and all that was trained beside them.

    `vision_tower`: takes the place of the tower that the adapter's `config.json` names.

    Raises:
        MixLoraError: a merged weight is not finite in the base's dtype, or the base lacks what the adapter replaces.
    """
    replaced = {_name_in_base(name): tensor for name, tensor in adapter.further_tensors().items()}
    added = adapter.beside
    stored = StoredWeights(base)
    for name, tensor in replaced.items():
        check_fits(name, list(tensor.shape), stored, base)
    contents = read_llava_config(adapter.folder) or read_json(base / "config.json")
    contents.pop("quantization_config", None)  # what is written here is not quantized
    if vision_tower is not None:
        contents["mm_vision_tower"] = absolute(vision_tower)
    contents = of_a_whole_model(contents, has_tower=any("vision_tower" in name for name in stored))
    (folder / "config.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if INPUT_EMBEDDINGS in added:  # its tokenizer has more tokens than the base's
            copy_own(adapter.folder, name, folder)
        elif (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    write_shards(_merged_tensors(stored, updates, {**replaced, **added}), folder)
    record_of_merged(adapter.folder, str(base)).save(folder)


def _name_in_base(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def _merged_tensors(
    stored: StoredWeights, updates: StaticUpdates, trained: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    dtype = torch.float32
    for name in tqdm(stored, desc="Merging", unit="tensor"):
        tensor = stored[name]
        dtype = tensor.dtype if tensor.is_floating_point() else dtype
        layer = name.removesuffix(".weight")
        if name in trained:
            tensor = trained[name].to(tensor.dtype)
        if layer in updates and name.endswith(".weight"):
            down, up = updates[layer]
            tensor = (tensor.float() + up.float() @ down.float()).to(tensor.dtype)
            if not tensor.isfinite().all():
                raise MixLoraError(
                    f"the merged {name} is not finite in {tensor.dtype}; the adapter is broken or too large"
                )
        yield name, tensor
    for name, tensor in trained.items():
        if name not in stored:
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
