"""Static updates made layer by layer from data.

The dynamic model reads conversations in LLaVA's format, through LLaVA's own data code, with the routes that it would
take in use. What its layers see is summed (see `static_core`); a part of the data is kept apart to judge the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.conversations import read_conversations
from ..data.drawing import drawn_evenly
from ..data.images import check_images
from ..data.kept_calibration import KEPT, kept_calibration
from ..errors import MixLoraError
from ..inference.grouping import groups_within
from ..inference.samples import Batch, SampleSource, check_shows_images
from ..method.layer import MixLoraLayer, Observer
from ..method.model import ADAPTER, adapted_layers
from ..method.static_core import (
    InputMoments,
    Moments,
    instance_input_moments,
    instance_moments,
    low_rank_pair,
    lstsq_core,
    mean_core,
    regression_map,
    squared_error,
    squared_error_of_map,
    squared_norm,
)
from .fidelity import ErrorsByLayer
from .static_adapter import StaticUpdates, relative

HELD_OUT, MOST_HELD_OUT = 0.2, 128  # share of the samples, and their number, that only judge the result
INPUT_SUMS = 4 << 30  # bytes of Σ xᵀx that are held at a time; the data are read again for further layers


@dataclass
class Calibrated:
    """By method, static updates and their errors by layer over the calibration data."""

    updates: dict[str, StaticUpdates] = field(default_factory=dict)
    errors: ErrorsByLayer = field(default_factory=dict)


def read_samples(given: SampleSource, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """The samples to calibrate on, and those to hold out, each of all tasks alike.

    Raises:
        MixLoraError: the file is missing or damaged, has fewer than two samples (of the task), names images that are
            not there, or names none although the model is one for images.
    """
    kept = kept_calibration(Path(given.data).parent) if Path(given.data).name == KEPT else None
    samples = read_conversations(given.data) if kept is None else kept.samples
    if given.task is not None:
        tasks = sorted({str(sample["task"]) for sample in samples if "task" in sample})
        samples = [sample for sample in samples if str(sample.get("task")) == given.task]
        if not samples:
            known = ", ".join(tasks[:20]) or "none: no sample has a field 'task'"
            raise MixLoraError(f"--task {given.task}: {given.data} has no samples of it; its tasks are {known}")
    if len(samples) < 2:
        raise MixLoraError(f"--calibration {given.data}: expected two samples at least, one of them to hold out")
    samples = drawn_evenly(samples, max(2, given.samples), seed)
    if kept is None:
        check_shows_images("--calibration", samples, given)
    elif any("image" in sample for sample in samples):
        _check_kept_images(samples, given)
    held_out = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(samples))))
    return samples[held_out:], samples[:held_out]


def _check_kept_images(samples: list[dict], given: SampleSource) -> None:
    if given.image_folder is None or not Path(given.image_folder).is_dir():
        raise MixLoraError(
            f"{given.data}: the images of the run's data are no longer in {given.image_folder}; pass where they are "
            "as --image-folder, other data as --calibration, or --method lstsq to do without data"
        )
    check_images(samples, given.data, given.image_folder)


def calibrate(model: nn.Module, read: Callable[[str], Iterator[Batch]], methods: tuple[str, ...]) -> Calibrated:
    """Static updates of every adapted layer by each of `methods`.

    Args:
        model: a PeftModel with a MixLoRA adapter, in evaluation mode.
        read: gives the batches, as keyword arguments of the model; called again where the sums for `"regression"` do
            not fit into [`INPUT_SUMS`] at once. It gets a title for a progress bar.
        methods: of [`static_core.METHODS`]; `"regression"` only beside `"lstsq"`.
    """
    layers = adapted_layers(model)
    sizes = {name: 8 * layer.in_features**2 for name, layer in layers.items()}  # of a float64 Σ xᵀx
    groups = groups_within(sizes, INPUT_SUMS) if "regression" in methods else [[]]
    found = Calibrated({method: {} for method in methods})
    for number, group in enumerate(groups, start=1):
        sums = {name: _Sums(with_inputs=name in group) for name in (layers if number == 1 else group)}
        title = "Calibrating" if len(groups) == 1 else f"Calibrating, pass {number} of {len(groups)}"
        with observed(layers, {name: of_layer.add for name, of_layer in sums.items()}):
            for batch in read(title):
                with torch.no_grad():
                    model(**batch)
        for name, of_layer in sums.items():
            updates, errors = of_layer.solve(layers[name], methods)
            for method, update in updates.items():
                found.updates[method][name] = update
            found.errors.setdefault(name, {}).update(errors)
    found.errors = {name: {method: found.errors[name][method] for method in methods} for name in layers}
    return found


class _Sums:
    """What one layer has seen."""

    def __init__(self, with_inputs: bool) -> None:
        self.with_inputs = with_inputs
        self.moments: Tensor | None = None
        self.inputs: InputMoments | None = None

    def add(
        self, layer: MixLoraLayer, adapter: str, x: Tensor, z: Tensor, cores: Tensor, attended: Tensor | None
    ) -> None:
        new = instance_moments(z, cores, attended)
        self.moments = new if self.moments is None else self.moments.add_(new)
        if self.with_inputs:
            parts = instance_input_moments(x, z, cores, attended)
            self.inputs = (
                parts if self.inputs is None else InputMoments(*(s.add_(p) for s, p in zip(self.inputs, parts)))
            )

    def solve(
        self, layer: MixLoraLayer, methods: tuple[str, ...]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
        """Static updates by method, on the CPU, and their relative errors; of those that the sums suffice for."""
        factors_A, factors_B = layer.mixlora_A[ADAPTER].detach(), layer.mixlora_B[ADAPTER].detach()
        updates, errors = {}, {}
        if self.moments is None:  # a layer that no forward pass runs, such as a tower's last
            E = len(factors_B)
            nothing = low_rank_pair(factors_A.cpu(), factors_B.cpu(), torch.zeros(E, E))
            return dict.fromkeys(methods, nothing), dict.fromkeys(methods, 0.0)
        moments = Moments(*self.moments)
        entries = layer.settings[ADAPTER].r * layer.settings[ADAPTER].scaling
        norm = squared_norm(moments, factors_B)
        cores = {"mean": mean_core(moments, entries), "lstsq": lstsq_core(moments, entries)}
        for method, core in cores.items():
            if method in methods:
                updates[method] = tuple(matrix.cpu() for matrix in low_rank_pair(factors_A, factors_B, core))
                errors[method] = relative(squared_error(moments, factors_B, core), norm)
        if self.inputs is not None:
            weight = regression_map(self.inputs, factors_A, cores["lstsq"])
            error = squared_error_of_map(moments.power, self.inputs, factors_B, weight)
            if error < squared_error(moments, factors_B, cores["lstsq"]):
                updates["regression"] = weight.t().float().cpu().contiguous(), factors_B.t().float().cpu().contiguous()
                errors["regression"] = relative(error, norm)
            else:  # nothing to gain but what rounding in float32 makes of it
                updates["regression"], errors["regression"] = updates["lstsq"], errors["lstsq"]
        return updates, errors


@contextmanager
def observed(layers: dict[str, MixLoraLayer], observers: dict[str, Observer]) -> Iterator[None]:
    """Let each layer show its forward passes to its observer, as long as the context lasts."""
    for name, observer in observers.items():
        layers[name].observer = observer
    try:
        yield
    finally:
        for layer in layers.values():
            layer.observer = None
