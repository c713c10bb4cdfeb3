"""What a checkpoint tells of the run that wrote it, and whether a run with the flags of now goes on from it.

Upstream goes on by itself when `--output_dir` holds a checkpoint, whatever the flags say: some of them are then
silently ignored (optimizer and scheduler come from the checkpoint), some mean something else. A run goes on when it
ends as it would have ended with these flags and without the interruption; only its length may change.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.trainer_callback import TrainerState

from ..adapters.adapter_folder import NON_LORA_TRAINABLES, is_mixlora_adapter, read_config, read_fields
from ..adapters.fingerprints import weights_fingerprint
from ..adapters.pickles import refuse_code
from ..adapters.reading import read
from ..errors import MixLoraError
from ..inputs import expanded, read_json
from ..method.config import MixLoraConfig
from .checkpoint import RUN, TRAINER_STATE, checkpoints, files_of, sha256_of, verify

FREE = re.compile(
    # where things go, and what is told
    r"output_dir|overwrite_output_dir|run_name|project|report_to|disable_tqdm|debug|cache_dir|image_folder|data_path|"
    r"(logging|log|save|hub|push_to_hub|trackio|include)_.*|push_to_hub|enable_jit_checkpoint|skip_memory_metrics|"
    # measuring
    r"(do|eval|per_device_eval|per_gpu_eval|batch_eval)_.*|evaluation_strategy|prediction_loss_only|"
    r"load_best_model_at_end|metric_for_best_model|greater_is_better|early_stopping_patience|"
    # how it is computed, with the same result
    r"dataloader_(?!drop_last).*|lazy_preprocess|ddp_.*|local_rank|use_cpu|no_cuda|use_ipex|use_mps_device|"
    r"(gradient|activation)_checkpointing.*|torch_compile.*|torch_empty_cache_steps|use_liger_kernel|jit_mode_eval|"
    # how long, and what resuming itself is told
    r"num_train_epochs|max_steps|resume_from_checkpoint|ignore_data_skip|restore_callback_states_from_checkpoint|"
    # told by the data that they leave
    r"check_images|max_lost_share|mixlora_calibration_samples|"
    # told by their product, and by what the adapter's configuration says
    r"per_(device|gpu)_train_batch_size|gradient_accumulation_steps|mixlora_preset"
)
"""Names of flags that may differ; every other one decides what is learnt."""
PATHS = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "deepspeed")
"""Flags that name files, which may lie elsewhere later."""
FREE_OF_THE_ADAPTER = (
    *("target_modules", "exclude_modules", "base_model_name_or_path", "inference_mode", "revision", "peft_version"),
    *("auto_mapping", "task_type", "peft_type", "format_version", "unknown_prompt"),
)
"""Fields of [`MixLoraConfig`] that flags do not set, or that change nothing in what is learnt."""
OF_THE_ADAPTER = re.compile(f"(?:mixlora|lora)_({'|'.join(field.name for field in fields(MixLoraConfig))})")
"""Flags that describe a MixLoRA adapter; they are compared by the configuration that they come to."""
UNPICKLED = ("optimizer*", "scheduler*", "rng_state*", "scaler*", "*.pt", "*.pth")
"""Files, as patterns, that are unpickled when a run goes on: by DeepSpeed, and by Trainer before PyTorch 2.6, with all
that is in them."""
OF_STATE = {
    **dict.fromkeys(("global_step", "max_steps"), int),
    **dict.fromkeys(("epoch", "num_train_epochs", "total_flos"), (int, float, type(None))),
    "log_history": list,
    "stateful_callbacks": (dict, type(None)),
    "best_model_checkpoint": (str, type(None)),
    "best_metric": (int, float, type(None)),
}
"""Fields of a `TrainerState` that a run goes on from, and their types."""
SHOWN = 200  # letters of a value
WAY_OUT = "use the flags and data that it was trained with to go on, or choose another --output_dir"
NEW_DATA = f"{WAY_OUT} (--mixlora_init_from {{}} starts from its weights)"


@dataclass(frozen=True)
class Run:
    """What decides the result of a run of `llava.train.train`.

    Args:
        flags: all flags by name, with their values or defaults, as the command line gives them.
        samples: how many conversations there are.
        data: checksum of their ids, texts, image names and tasks, in their order.
        processes: how many train.
        contents: by flag of [`PATHS`], a checksum of what lies there.
    """

    flags: dict[str, Any]
    samples: int
    data: str
    processes: int
    contents: dict[str, str]

    @property
    def samples_per_step(self) -> int:
        """How many samples a step of the optimizer takes."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        return math.prod(int(self.flags[name]) for name in names if name in self.flags) * self.processes


def describe_run(flags: Mapping[str, Any], samples: Iterable[Mapping[str, Any]], processes: int) -> Run:
    """What decides the result of a run with these flags on these conversations."""
    flags = json.loads(json.dumps(dict(flags), default=str))  # as it will be read again
    contents = {name: found for name in PATHS if (found := _content(flags.get(name)))}
    return Run(flags, *_fingerprint(samples), processes, contents)


def write_run(run: Run, checkpoint: Path) -> None:
    """Write `run.json` into a checkpoint that is complete but for it, with the names of its files."""
    names = [path.relative_to(checkpoint).as_posix() for path in files_of(checkpoint)]
    contents = {**asdict(run), "files": names}
    (checkpoint / RUN).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def read_run(checkpoint: Path) -> Run | None:
    """The run that wrote a checkpoint; None where that is not told, by an earlier version or by LLaVA alone.

    Raises:
        MixLoraError: `run.json` is damaged.
    """
    if not (checkpoint / RUN).is_file():
        return None
    contents = read_json(checkpoint / RUN, only_numbers=False)
    expected = {"flags": dict, "samples": int, "data": str, "processes": int, "contents": dict}
    for name, kind in expected.items():
        if not isinstance(contents.get(name), kind):
            raise MixLoraError(f"{checkpoint / RUN} is damaged: {name} is no {kind.__name__}; remove {checkpoint}")
    return Run(**{name: contents[name] for name in expected})


def check_resuming(output_dir: str | Path, now: Run, adapter: MixLoraConfig | None) -> list[str]:
    """Refuse to go on from checkpoints of a run that would have ended otherwise.

    Args:
        output_dir: holds the checkpoints; without any there is nothing to check.
        now: the run that is about to go on from them.
        adapter: what its flags describe; None for LLaVA's own LoRA.

    Returns:
        Lines that tell what differs, from the newest checkpoint, and may.

    Raises:
        MixLoraError: names the checkpoint, all that differs, and the way out.
    """
    found, notes, newest = checkpoints(output_dir), [], None
    for checkpoint in found:
        _check_same_adapter(checkpoint, adapter)
        try:
            then = read_run(checkpoint)
        except MixLoraError:  # it will be skipped as damaged
            continue
        if then is not None:
            _check_same_run(checkpoint, then, now, adapter is not None)
        if newest is None:
            newest = checkpoint
            notes += [f"note: {checkpoint} {note}" for note in _notes(then, now)]
    return notes


def check_usable(checkpoint: Path) -> None:
    """Refuse a checkpoint that is damaged, whose adapter is none, or whose state would run code.

    Raises:
        MixLoraError: as [`checkpoint.verify`] and [`reading.read`]; or a pickled file holds code.
    """
    verify(checkpoint)
    for file in files_of(checkpoint):
        if any(fnmatch(file.name, pattern) for pattern in UNPICKLED):
            refuse_code(file)
    _check_state(checkpoint / TRAINER_STATE)
    read(checkpoint)


def finished(output_dir: str | Path, now: Run) -> Path | None:
    """The checkpoint of the last step, where the newest is it; None where something is left to train.

    Where only the run's length in epochs is known, and it is not that of the checkpoint, None too: Trainer counts then.
    """
    for checkpoint in checkpoints(output_dir)[:1]:
        try:
            state, then = read_json(checkpoint / TRAINER_STATE, only_numbers=False), read_run(checkpoint)
            if then is None or state["global_step"] < _last_step(state, then.flags, now.flags):
                return None
            verify(checkpoint)
        except (MixLoraError, KeyError, TypeError):  # a damaged one, which will be skipped
            return None
        return checkpoint
    return None


def is_written(output_dir: str | Path, checkpoint: Path) -> bool:
    """Whether the final result of the run that wrote `checkpoint` as its last is there, all of it.

    `train()` writes Trainer's state first, then the adapter, then what was trained beside it.
    """
    order = [Path(output_dir) / name for name in (TRAINER_STATE, SAFETENSORS_WEIGHTS_NAME, NON_LORA_TRAINABLES)]
    if not all(file.is_file() for file in (*order, order[0].with_name(CONFIG_NAME), order[0].with_name("config.json"))):
        return False
    times = [file.stat().st_mtime_ns for file in order]
    try:
        steps = [read_json(file, only_numbers=False)["global_step"] for file in (order[0], checkpoint / TRAINER_STATE)]
    except (MixLoraError, KeyError):
        return False
    return times == sorted(times) and steps[0] == steps[1]


def _check_state(file: Path) -> None:
    """Refuse a Trainer's state that a Trainer would not load, or could not count on from.

    Raises:
        MixLoraError: names the field.
    """
    state = read_json(file, only_numbers=False)
    for name, value in state.items():
        kind = OF_STATE.get(name, object)
        if name not in TrainerState.__dataclass_fields__:
            raise MixLoraError(
                f"{file}: {name[:100]!r} is no field of a Trainer's state here; was it written elsewhere?"
            )
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise MixLoraError(f"{file} is damaged: {name}={repr(value)[:100]}; use an earlier checkpoint")


def _fingerprint(samples: Iterable[Mapping[str, Any]]) -> tuple[int, str]:
    digest, count = hashlib.sha256(), 0
    for sample in samples:
        told = [str(sample.get(name)) for name in ("id", "image", "task")]
        for turn in sample["conversations"]:
            told += (str(turn.get("from")), str(turn.get("value")))
        # Not as JSON, which takes four times as long for the hundreds of thousands that LLaVA is trained on.
        digest.update("\0".join((*told, "\n")).encode("utf-8", "surrogatepass"))
        count += 1
    return count, digest.hexdigest()


def _content(path: Any) -> str | None:
    """A checksum of a file; of a model's folder, that of its configuration and of its weights' fingerprint."""
    if not isinstance(path, str) or not expanded(path).exists():
        return None
    place = expanded(path)
    if place.is_file():
        return sha256_of(place)
    digest = hashlib.sha256()
    if (place / "config.json").is_file():
        digest.update((place / "config.json").read_bytes())
    digest.update((weights_fingerprint(place) or "").encode())
    return digest.hexdigest()


def _check_same_adapter(checkpoint: Path, wanted: MixLoraConfig | None) -> None:
    try:
        read_fields(checkpoint)
    except MixLoraError:  # the checkpoint will be skipped as damaged
        return
    if is_mixlora_adapter(checkpoint) != (wanted is not None):
        kind = "no MixLoRA adapter but one of another kind" if wanted is not None else "a MixLoRA adapter"
        raise MixLoraError(f"{checkpoint} holds {kind}; {WAY_OUT}")
    if wanted is None:
        return
    found = read_config(checkpoint)
    names = [field.name for field in fields(MixLoraConfig) if field.name not in FREE_OF_THE_ADAPTER]
    differing = [name for name in names if getattr(found, name) != getattr(wanted, name)]
    if differing:
        then, now = (", ".join(f"{n}={_shown(getattr(of, n))}" for n in differing) for of in (found, wanted))
        raise MixLoraError(f"{checkpoint} holds an adapter with {then}, but the flags say {now}; {WAY_OUT}")


def _check_same_run(checkpoint: Path, then: Run, now: Run, is_mixlora: bool) -> None:
    if (then.samples, then.data) != (now.samples, now.data):
        what = f"{then.samples} conversations, but --data_path has {now.samples}"
        if then.samples == now.samples:
            what = f"other data: as many conversations ({now.samples}), but other ids, texts, images or another order"
        way_out = NEW_DATA.format(checkpoint) if is_mixlora else WAY_OUT
        raise MixLoraError(f"{checkpoint} was trained on {what}; {way_out}")
    differing = list(_differing_flags(then, now, is_mixlora))
    if differing:
        old, new = (", ".join(f"--{name} {_shown(pair[side])}" for name, *pair in differing) for side in (0, 1))
        raise MixLoraError(f"{checkpoint} was trained with {old}, but the flags now say {new}; {WAY_OUT}")


def _differing_flags(then: Run, now: Run, is_mixlora: bool) -> Iterator[tuple[str, Any, Any]]:
    for name in now.flags:
        if FREE.fullmatch(name) or (is_mixlora and OF_THE_ADAPTER.fullmatch(name)):
            continue
        old, new = then.flags.get(name), now.flags[name]
        if name in then.contents and name in now.contents:
            if then.contents[name] != now.contents[name]:
                yield name, f"{old} (other contents then)", new
        elif old != new and (name in then.flags or new not in (None, False)):
            yield name, old, new
    of_step = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if then.samples_per_step != now.samples_per_step:
        yield "per_device_train_batch_size", *(_batch(run, of_step) for run in (then, now))
    elif then.processes != now.processes and now.flags.get("deepspeed"):
        yield "deepspeed", *(f"with {run.processes} processes" for run in (then, now))


def _batch(run: Run, names: tuple[str, str]) -> str:
    sizes = " × ".join(str(run.flags.get(name)) for name in names)
    return f"{sizes} (accumulation) × {run.processes} (processes) = {run.samples_per_step}"


def _notes(then: Run | None, now: Run) -> Iterator[str]:
    if then is None:
        yield (
            "does not tell its data and flags (an earlier version or LLaVA alone wrote it), so they are not compared "
            "with those of now"
        )
        return
    lengths = [name for name in ("max_steps", "num_train_epochs") if then.flags.get(name) != now.flags.get(name)]
    if lengths:
        old, new = (", ".join(f"--{name} {run.flags.get(name)}" for name in lengths) for run in (then, now))
        yield (
            f"was trained with {old}, now {new}: from here on the learning rate follows its schedule over the new "
            "length, as if that had been asked for from the first step"
        )
    if then.processes != now.processes:
        yield f"was trained by {then.processes} processes, now {now.processes}: as many samples a step, other draws"


def _last_step(state: Mapping[str, Any], then: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    if now["max_steps"] > 0:
        return now["max_steps"]
    if then["max_steps"] > 0:
        return math.inf
    steps_per_epoch = state["max_steps"] / then["num_train_epochs"]
    return math.ceil(round(steps_per_epoch * now["num_train_epochs"], 6))


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, (str, int, float)) or value is None else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
