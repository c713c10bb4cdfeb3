"""`llava-mixlora interference`: how a gradient step on one task changes another task's loss, layer by layer.

The samples of each task are cut into mini-batches, and a gradient is taken of each batch's loss with respect to one
layer's A, one layer's B, or those of all layers together. What a step along one gradient does to the other batches
follows from inner products alone: see `interference_estimate`. Routes are those of the forward pass and stay: routers
make no step, and no straight-through gradient, which no real step on a factor would follow, flows into the factors.

Interference belongs to a moment of training. At its converged end a task's own batches no longer agree on a direction,
so there is nothing to compare with: measure a `checkpoint-N` from the middle, on data that is not trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..errors import MixLoraError
from ..inference.conversation import conversation_of
from ..inference.grouping import groups_within
from ..inference.loading import load_for_inference
from ..inference.model_flags import add_model_flags, choices_of
from ..inference.samples import SampleSource, batches, samples_by_task
from ..inputs import check_model_path, check_writable, positive
from ..method.model import ADAPTER, adapted_layers
from ..method.routing_statistics import POOLS
from ..method.tensor_names import PEFT_PREFIX
from ..own_files import own_place
from .interference_estimate import FEWEST_BATCHES, MEAN_OF_RATIOS, RATIO_OF_MEANS, estimate
from .interference_report import Interference
from .recommendation import recommend
from .separability import PictureMeans, separability

FACTORS = {pool: (f"mixlora_{pool}", f"lora_{pool}") for pool in POOLS}
GRADIENTS = 4 << 30  # bytes of gradients that are held at a time; the data are read again for further layers
Key = tuple[str, str]
"""A pool (`"A"` or `"B"`) and a layer name."""


def add_interference(parser: argparse.ArgumentParser) -> None:
    """Describe the command `interference` to its parser."""
    parser.description = (
        "For each pair of tasks, and for A and B of each layer: what a gradient step on the one does to the other's "
        "loss, in units of what the other's own step does. 1: as good; 0: nothing; below 0: harm. Measure a checkpoint "
        "from the middle of training, on data that is not trained on. Ends in a recommendation: whether routing would "
        "help, and which option. Needs matplotlib for the heatmaps."
    )
    parser.epilog = (
        "example: llava-mixlora interference output/llava-mixlora/checkpoint-100 --data heldout.json "
        "--image-folder images"
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a MixLoRA adapter, or of LLaVA's own LoRA")
    parser.add_argument("--data", required=True, metavar="DATA", help="LLaVA's training data with fields 'task'")
    parser.add_argument("--image-folder", metavar="DIR", help="where the images of DATA lie")
    parser.add_argument("--samples", type=positive, default=64, help="how many of each task (default: 64)")
    parser.add_argument("--batch-size", type=positive, default=8, help="samples of a gradient (default: 8)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="NAME", help="only layers with one of these in their name: layers.0"
    )
    parser.add_argument(
        "--estimator",
        default=RATIO_OF_MEANS,
        choices=(RATIO_OF_MEANS, MEAN_OF_RATIOS),
        help="where the mean over batches is taken: of both losses' changes (default), or of their ratio as in the "
        "paper, which one batch can decide whose own loss hardly changes",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples (default: 0)")
    parser.add_argument("--version", help="conversation template (default: that of its training, or v1)")
    parser.add_argument("--model-base", metavar="BASE", help="the adapter's base (default: the one that it names)")
    parser.add_argument(
        "--output", metavar="DIR", help="folder for interference.json and .png (default: ADAPTER/interference)"
    )
    add_model_flags(parser)
    parser.set_defaults(command=_interference)


def _interference(given: argparse.Namespace) -> None:
    check_model_path("ADAPTER", given.adapter)
    output = Path(given.output or own_place(given.adapter, "interference"))
    check_writable(output, "--output")
    version = conversation_of(given.adapter, given.version, "--version", otherwise="v1")
    data = SampleSource(
        given.data, given.image_folder, samples=given.samples, version=version, batch_size=given.batch_size
    )
    of_the_model = (given.adapter, given.model_base)
    of_the_measure = (given.tasks, given.layers, given.estimator, given.seed)
    found = interference(*of_the_model, data, *of_the_measure, choices=choices_of(given))
    found.save(output)
    print("\n".join(found.lines()))
    print(f"Wrote interference.json and interference.png to {output}")


def interference(
    model_path: str | Path,
    model_base: str | None,
    data: SampleSource,
    tasks: Sequence[str] = (),
    layers: Sequence[str] = (),
    estimator: str = RATIO_OF_MEANS,
    seed: int = 0,
    choices: ModelChoices = AS_NAMED,
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
        choices: what the user says of the model's parts.

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
    loaded = load_for_inference(model_path, model_base, keep_adapter=True, choices=choices)
    model = loaded[1]
    if model.dtype == torch.float16:
        model.bfloat16()  # gradients underflow in float16
    parameters = factor_parameters(model, layers)
    fix_routes(model)
    pictures = PictureMeans(model)
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
        found.together[pool] = estimate(_sum(of_pool.values()), estimator)
    embeddings = model.get_base_model().get_input_embeddings()
    found.recommendation = recommend(
        found.tasks,
        estimate(_sum(grams.values()), estimator),
        [one for of_pool in found.by_layer.values() for one in of_pool.values()],
        separability(samples, loaded[0], embeddings, pictures.of_first(len(drawn))),
        routed=bool(adapted_layers(model)),
    )
    return found


def _sum(grams: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(grams)).double().sum(dim=0)


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
