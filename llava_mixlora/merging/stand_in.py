"""Which static stand-in an adapter gets, and how good it is: from data where there are some, and judged by them."""

from __future__ import annotations

from pathlib import Path

from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..data.kept_calibration import KEPT, KeptCalibration, kept_calibration
from ..errors import MixLoraError
from ..inference.conversation import conversation_of
from ..inference.loading import load_for_inference
from ..inference.samples import SampleSource, batches, endless_batches
from ..method import static_core
from .calibration import calibrate, read_samples
from .distillation import STEPS, distilled
from .fidelity import Fidelity
from .judging import judge
from .static_adapter import FROM_STATISTICS, SavedAdapter, StaticUpdates

DISTILLATION = "distillation"
METHODS = (*static_core.METHODS, DISTILLATION)
WITHOUT_DATA = "lstsq"
"""The default where there are only the statistics of training."""
TEMPLATE = "v1"
"""Of an adapter that does not tell which it was trained with."""


def static_updates(
    adapter: SavedAdapter,
    base: Path,
    method: str | None = None,
    calibration: SampleSource | None = None,
    choices: ModelChoices = AS_NAMED,
    steps: int = STEPS,
) -> tuple[dict[str, StaticUpdates], Fidelity]:
    """By method, the static updates of an adapter (`method`'s, and others that come along), and how good they are.

    Args:
        adapter: what to stand in for.
        base: the folder of its base.
        method: of [`METHODS`]; by default `"distillation"`, or `"lstsq"` without data.
        calibration: data to make and judge them by; without, they come from the statistics of training.
        choices: what the user says of the model's parts.
        steps: of `"distillation"`.

    Raises:
        MixLoraError: there is no such method, or neither statistics nor the data that it needs.
    """
    method = method or (WITHOUT_DATA if calibration is None else DISTILLATION)
    if method not in METHODS:
        raise MixLoraError(f"--method {method}: expected one of {', '.join(METHODS)}")
    fidelity = Fidelity(str(adapter.folder), str(base), method, training=adapter.relative_errors())
    if calibration is None:
        return {method: adapter.static_updates(method)}, fidelity
    fit, held_out = read_samples(calibration)
    loaded = load_for_inference(adapter.folder, base, choices=choices)
    model = loaded[1]
    by_layer = static_core.METHODS if method == "regression" else static_core.METHODS[:2]  # which is costly
    found = calibrate(model, lambda title: batches(fit, loaded, calibration, title), by_layer)
    updates = found.updates
    if method == DISTILLATION:
        endless = endless_batches(fit, loaded, calibration)
        updates[method] = distilled(model, endless, updates[WITHOUT_DATA], calibration.batch_size, steps)
    fidelity.task, fidelity.samples = calibration.task, {"calibration": len(fit), "held out": len(held_out)}
    fidelity.calibration = found.errors
    fidelity.heldout, fidelity.agreement, fidelity.by_task = judge(
        model,
        lambda title: batches(held_out, loaded, calibration, title),
        updates,
        [sample.get("task") for sample in held_out],
    )
    return updates, fidelity


def source_of_kept(
    adapter: str | Path,
    method: str | None = None,
    image_folder: str | None = None,
    version: str | None = None,
    task: str | None = None,
    **options: int,
) -> SampleSource | None:
    """What a run has kept beside its adapter, as calibration data; says one line where it cannot be used.

    Args:
        adapter: the adapter's folder.
        method: what is to be made of it; the methods that statistics suffice for do without images that are gone.
        image_folder, version, task: instead of those of the run, and of all tasks.
        options: further fields of [`SampleSource`].

    Returns:
        None where nothing was kept, or not what it takes.

    Raises:
        MixLoraError: a `task` is asked for, and nothing was kept; or it was kept with another template than the
            adapter's record tells.
    """
    kept = kept_calibration(adapter)
    if kept is None and task is not None:
        raise MixLoraError(
            f"--task {task} chooses among the samples of {KEPT} beside the adapter, or of --calibration DATA; neither "
            "is there"
        )
    if kept is None:
        print(
            f"{adapter} keeps no {KEPT} (of an older version, or --mixlora_calibration_samples 0): merging by the "
            "statistics of training, which loses more, unmeasured; better: --calibration DATA --image-folder DIR",
            flush=True,
        )
        return None
    folder = image_folder or kept.image_folder
    if task is None and method in FROM_STATISTICS and folder is not None and not Path(folder).is_dir():
        print(f"{folder} is gone, in which the images of {KEPT} lie: merging by the statistics of training", flush=True)
        return None
    return SampleSource(str(Path(adapter) / KEPT), folder, task, version=_template(adapter, version, kept), **options)


def _template(adapter: str | Path, said: str | None, kept: KeptCalibration) -> str:
    chosen = conversation_of(adapter, said, "--version", otherwise=kept.version)
    if said is None and chosen != kept.version:
        raise MixLoraError(
            f"{Path(adapter) / KEPT} was kept by a run with the template {kept.version}, and the record of {adapter} "
            f"says {chosen}; say which it is with --version, or give other data as --calibration"
        )
    return chosen
