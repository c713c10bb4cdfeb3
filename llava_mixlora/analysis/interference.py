"""`llava-mixlora interference`: how a gradient step on one task changes another task's loss, layer by layer.

The samples of each task are cut into mini-batches, and a gradient is taken of each batch's loss with respect to one
layer's A, one layer's B, or those of all layers together. What a step along one gradient does to the other batches
follows from inner products alone: see `interference_estimate`. Routes are those of the forward pass and stay: routers
make no step, and no straight-through gradient, which no real step on a factor would follow, flows into the factors.

Interference belongs to a moment of training. At its converged end a task's own batches no longer agree on a direction,
so there is nothing to compare with: measure a `checkpoint-N` from the middle, on data that is not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from ..errors import MixLoraError
from ..inference.loading import load_for_inference
from ..merging.calibration import ADAPTER, CalibrationData, adapted_layers, batches, groups_within, samples_by_task
from ..merging.static_adapter import PEFT_PREFIX
from ..method.routing_statistics import POOLS
from .interference_estimate import FEWEST_BATCHES, RATIO_OF_MEANS, estimate
from .interference_report import Interference

FACTORS = {pool: (f"mixlora_{pool}", f"lora_{pool}") for pool in POOLS}
GRADIENTS = 4 << 30  # bytes of gradients that are held at a time; the data are read again for further layers
Key = tuple[str, str]
"""A pool (`"A"` or `"B"`) and a layer name."""


def interference(
    model_path: str | Path,
    model_base: str | None,
    data: CalibrationData,
    tasks: Sequence[str] = (),
    layers: Sequence[str] = (),
    estimator: str = RATIO_OF_MEANS,
    seed: int = 0,
) -> Interference:
    """Measure a MixLoRA or LoRA adapter on data of several tasks.

    Args:
        model_path: the adapter's folder.
        model_base: its base; by default the one that it names.
        data: conversations with a field `"task"`; `samples` of each task make `samples // batch_size` batches.
        tasks: the tasks to compare; all of the data when empty.
        layers: see [`factor_parameters`].
        estimator: see [`estimate`].
        seed: of the choice of samples.

    Raises:
        MixLoraError: there are fewer than two tasks, too few samples of one, no images, or no such layers; a loss is
            not finite; or the data or the adapter cannot be read.
    """
    number = data.samples // data.batch_size
    if number < FEWEST_BATCHES:
        raise MixLoraError(
            f"--samples {data.samples} with --batch-size {data.batch_size}: expected {FEWEST_BATCHES} batches of each "
            f"task at least, got {number}; ask for more samples, or for smaller batches"
        )
    samples = samples_by_task(replace(data, samples=number * data.batch_size), tasks, seed)
    if Path(model_path).is_dir() and not (Path(model_path) / CONFIG_NAME).is_file():
        raise MixLoraError(f"{model_path} has no {CONFIG_NAME}; expected the folder of a MixLoRA or LoRA adapter")
    loaded = load_for_inference(model_path, model_base, keep_adapter=True)
    model = loaded[1]
    if model.dtype == torch.float16:
        model.bfloat16()  # gradients underflow in float16
    parameters = factor_parameters(model, layers)
    fix_routes(model)
    task_of_batch = [task for task in samples for _ in range(number)]
    drawn = [sample for of_task in samples.values() for sample in of_task]

    def losses(title: str) -> Iterator[Tensor]:
        for batch, task in zip(batches(drawn, loaded, data, title), task_of_batch):
            loss = model(**batch).loss
            if not loss.isfinite():
                raise MixLoraError(
                    f"the loss of a batch of task {task!r} is {loss.item()}; check that its samples have answers, and "
                    f"that --version {data.version} is the conversation template of the training"
                )
            yield loss

    grams = {
        key: gram.view(len(samples), number, len(samples), number)
        for key, gram in gram_matrices(losses, len(task_of_batch), parameters).items()
    }
    found = Interference(str(model_path), list(samples), number, data.batch_size, seed, estimator)
    for pool in POOLS:
        of_pool = {layer: gram for (p, layer), gram in grams.items() if p == pool}
        found.by_layer[pool] = {layer: estimate(gram, estimator) for layer, gram in of_pool.items()}
        # The gradient of all layers' factors is that of each behind the other, so its inner products are sums.
        found.together[pool] = estimate(torch.stack(list(of_pool.values())).double().sum(dim=0), estimator)
    return found


def factor_parameters(model: nn.Module, layers: Sequence[str] = ()) -> dict[Key, nn.Parameter]:
    """The A and B of every adapted layer, of MixLoRA and LoRA alike; those alone require gradients afterwards.

    Args:
        model: a PeftModel.
        layers: only layers in whose name one of these is, as whole parts of it: `layers.1`, `q_proj`, `0.mlp`.

    Raises:
        MixLoraError: there are none.
    """
    factors: dict[Key, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        for pool, words in FACTORS.items():
            for word in words:
                layer, found, _ = name.partition(f".{word}.")
                if found:
                    factors[pool, layer.removeprefix(PEFT_PREFIX)] = parameter
    names = list(dict.fromkeys(layer for _, layer in factors))
    if not names:
        raise MixLoraError("the adapter has no factors A and B; expected a MixLoRA or LoRA adapter")
    chosen = [name for name in names if not layers or any(f".{part}." in f".{name}." for part in layers)]
    if not chosen:
        raise MixLoraError(
            f"--layers {' '.join(layers)}: no adapted layer has it in its name; expected parts of names such as "
            f"{names[0]} to {names[-1]}"
        )
    factors = {(pool, layer): parameter for (pool, layer), parameter in factors.items() if layer in chosen}
    for parameter in factors.values():
        parameter.requires_grad_(True)
    return factors


def fix_routes(model: nn.Module) -> None:
    """Let no gradient of the routers' scores flow, neither into the factors nor into the layers before."""
    for layer in adapted_layers(model).values():
        layer.settings[ADAPTER] = replace(layer.settings[ADAPTER], straight_through=False)


def gram_matrices(
    losses: Callable[[str], Iterator[Tensor]], number: int, parameters: dict[Key, nn.Parameter]
) -> dict[Key, Tensor]:
    """The inner products of the losses' gradients with respect to each parameter, float32 [number, number].

    Parameters on which no loss depends are left out.

    Args:
        losses: gives the `number` losses in the same order each time; called again where the gradients do not fit into
            [`GRADIENTS`] at once. It gets a title for a progress bar.
        number: how many losses there are.
        parameters: those of [`factor_parameters`].

    Raises:
        MixLoraError: no loss depends on any parameter.
    """
    sizes = {key: 4 * number * parameter.numel() for key, parameter in parameters.items()}  # float32
    groups = groups_within(sizes, GRADIENTS)
    grams: dict[Key, Tensor] = {}
    for turn, group in enumerate(groups, start=1):
        rows = {key: torch.zeros(number, parameters[key].numel()) for key in group}
        reached = set()
        title = "Gradients" if len(groups) == 1 else f"Gradients, pass {turn} of {len(groups)}"
        for position, loss in enumerate(losses(title)):
            if not loss.requires_grad:
                raise MixLoraError("the loss depends on no factor of these layers; choose layers of the language model")
            gradients = torch.autograd.grad(loss, [parameters[key] for key in group], allow_unused=True)
            for key, gradient in zip(group, gradients):
                if gradient is not None:
                    reached.add(key)
                    rows[key][position] = gradient.flatten()
        grams |= {key: rows[key] @ rows[key].t() for key in group if key in reached}
    return grams
