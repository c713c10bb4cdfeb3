"""Which factors the routers choose for which task: usage by layer, maps of the routes, similarity of the tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..errors import MixLoraError
from ..inference.loading import load_for_inference
from ..inference.samples import SampleSource, batches, samples_by_task
from ..lettering import literal
from ..writing import whole_file, write_whole
from .plot_usage import pool_titles

RESULT, USAGE, MAP, SIMILARITY = "routes.json", "task_usage.png", "route_map.png", "task_similarity.png"


@dataclass(frozen=True)
class TaskRoutes:
    """Routes of samples.

    `chosen` by layer name, bool [samples, P, E], of the P choices that `pools` are the titles of: pool A and pool B, or
    one for both with `pairing="same"`; `labels` the index of their task.
    """

    tasks: list[str]
    labels: Tensor
    chosen: dict[str, Tensor]
    pools: list[str]

    def usage(self, layer: str) -> Tensor:
        """The share of a task's samples that choose a factor, float [tasks, P, E]."""
        chosen = self.chosen[layer].float()
        return torch.stack([chosen[self.labels == task].mean(dim=0) for task in range(len(self.tasks))])

    def similarity(self) -> Tensor:
        """Cosine similarity of the tasks' usage of all factors of all layers, float [tasks, tasks]; 1: the same."""
        usage = torch.cat([self.usage(layer).flatten(1) for layer in self.chosen], dim=1)
        usage = torch.nn.functional.normalize(usage, dim=1)
        return usage @ usage.t()

    def distances(self, layer: str) -> Tensor:
        """Jaccard distance of the samples' routes, float [samples, samples]: the share of factors that only one has."""
        chosen = self.chosen[layer].flatten(1).float()
        shared, sizes = chosen @ chosen.t(), chosen.sum(dim=1)
        return 1 - shared / (sizes.unsqueeze(1) + sizes - shared)

    def three_layers(self) -> list[str]:
        """The first, the middle and the last layer, as in the paper's figure."""
        layers = list(self.chosen)
        return list(dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])))


def task_routes(
    model_path: str | Path, model_base: str | None, data: SampleSource, choices: ModelChoices = AS_NAMED
) -> TaskRoutes:
    """The routes that an adapter takes for the prompts of `data`, `data.samples` of each task.

    Raises:
        MixLoraError: as [`samples_by_task`] and [`load_for_inference`]; or the model has no MixLoRA adapter.
    """
    samples = samples_by_task(data)
    loaded = load_for_inference(model_path, model_base, choices=choices)
    model = loaded[1]
    if not hasattr(getattr(model, "base_model", None), "routes"):
        raise MixLoraError(f"{model_path} is no MixLoRA adapter, so it has no routes to draw")
    config = model.peft_config["default"]
    pools, E = pool_titles(config), config.num_factors
    seen: dict[str, list[Tensor]] = {}
    drawn = [sample for of_task in samples.values() for sample in of_task]
    for batch in batches(drawn, loaded, data, "Routing"):
        with torch.no_grad():
            model(**batch)
        for layer, route in model.base_model.routes().items():
            index = torch.stack((route.index_A, route.index_B)[: len(pools)], dim=1).cpu()  # [B, P, r]
            chosen = torch.zeros(*index.shape[:2], E, dtype=torch.bool).scatter_(2, index, True)
            seen.setdefault(layer, []).append(chosen)
    labels = torch.arange(len(samples)).repeat_interleave(data.samples)
    return TaskRoutes(list(samples), labels, {layer: torch.cat(chosen) for layer, chosen in seen.items()}, pools)


def draw_task_routes(routes: TaskRoutes, folder: Path) -> None:
    """Write `routes.json`, `task_usage.png`, `route_map.png` and `task_similarity.png` into `folder`.

    Raises:
        MixLoraError: matplotlib or scikit-learn is missing.
    """
    try:
        from matplotlib.figure import Figure
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise MixLoraError(f"plot --data needs {error.name}; pip install 'llava-mixlora[eval]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    usage = {layer: routes.usage(layer).tolist() for layer in routes.chosen}
    contents = {
        "tasks": routes.tasks,
        "pools": routes.pools,
        "usage": usage,
        "similarity": routes.similarity().tolist(),
    }
    write_whole(folder / RESULT, json.dumps(contents) + "\n")
    layers, tasks = routes.three_layers(), list(map(literal, routes.tasks))

    height = 1 + len(routes.pools) * (0.5 + 0.2 * len(tasks))
    figure = Figure(figsize=(4 * len(layers), height), layout="constrained")
    axes = figure.subplots(len(routes.pools), len(layers), squeeze=False, sharey=True)
    for column, layer in enumerate(layers):
        for axis, pool, share in zip(axes[:, column], routes.pools, routes.usage(layer).unbind(dim=1)):
            drawn = axis.imshow(share, aspect="auto", vmin=0, vmax=1)
            axis.set_title(f"{layer}, {pool}", fontsize=7)
            axis.set_xticks(range(0, share.shape[1], max(1, share.shape[1] // 8)))
            axis.set_yticks(range(len(tasks)), tasks, fontsize=6)
    figure.supxlabel("factor")
    figure.colorbar(drawn, ax=axes, label="share of a task's samples that choose a factor")
    with whole_file(folder / USAGE) as file:
        figure.savefig(file, dpi=110)

    figure = Figure(figsize=(4 * len(layers) + 1, 4), layout="constrained")
    axes = figure.subplots(1, len(layers), squeeze=False)[0]
    for axis, layer in zip(axes, layers):
        perplexity = min(30.0, (len(routes.labels) - 1) / 3)
        tsne = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=0)
        places = tsne.fit_transform(routes.distances(layer).numpy())
        for number, task in enumerate(tasks):
            mine = (routes.labels == number).numpy()
            axis.scatter(*places[mine].T, s=10, color=_color(number), label=task)
        axis.set_title(layer, fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("t-SNE of the routes", fontsize=9)
    with whole_file(folder / MAP) as file:
        figure.savefig(file, dpi=110)

    figure = Figure(figsize=(3 + 0.3 * len(tasks), 2 + 0.3 * len(tasks)), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(routes.similarity(), vmin=0, vmax=1)
    axis.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=7)
    figure.colorbar(drawn, label="cosine similarity of the factors used")
    with whole_file(folder / SIMILARITY) as file:
        figure.savefig(file, dpi=110)


def _color(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](number % 20)
