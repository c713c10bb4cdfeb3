"""How near static models come to the dynamic one, on data that they were not made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inference.samples import Batch
from ..method.layer import MixLoraLayer
from ..method.model import adapted_layers
from ..method.model_inputs import IGNORE_INDEX
from .calibration import observed
from .fidelity import Agreement, ErrorsByLayer
from .static_adapter import StaticUpdates
from .static_model import static_in_place


def judge(
    model: nn.Module,
    read: Callable[[str], Iterator[Batch]],
    updates: dict[str, StaticUpdates],
    tasks: Sequence[str | None],
    by_layer: bool = True,
) -> tuple[ErrorsByLayer, dict[str, Agreement], dict[str, dict[str, Agreement]]]:
    """Errors by layer and method, the agreement by method, and by method and task, of static models with the dynamic.

    Args:
        model: a PeftModel with a MixLoRA adapter, in evaluation mode.
        read: gives the batches, as keyword arguments of the model; it gets a title for a progress bar.
        updates: what to judge, by method.
        tasks: the tasks of the samples, in the order in which `read` gives them; None of those that name none.
        by_layer: whether to tell the errors by layer; they are most of the work.
    """
    layers = adapted_layers(model) if by_layer else {}
    errors = {name: _Errors({method: updates[method][name] for method in updates}) for name in layers}
    of_samples: dict[str, list[Tensor]] = {method: [] for method in updates}
    for batch in read("Comparing"):
        with observed(layers, {name: of_layer.add for name, of_layer in errors.items()}):
            dynamic = _predictions(model, batch)
        for method, of_method in updates.items():
            with static_in_place(model, of_method):
                of_samples[method].append(_compare(dynamic, _predictions(model, batch), batch["labels"][:, 1:]))
    sums = {method: torch.cat(found) for method, found in of_samples.items()}
    names = [str(task) for task in dict.fromkeys(tasks) if task is not None]
    by_task = {
        method: {name: _agreement(found[[str(task) == name for task in tasks]]) for name in names}
        for method, found in sums.items()
    }
    relative = {name: found.relative() for name, found in errors.items()}
    return relative, {method: _agreement(found) for method, found in sums.items()}, by_task


class _Errors:
    """How far static updates of one layer are from the dynamic one, position by position."""

    def __init__(self, updates: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.updates = updates
        self.error = dict.fromkeys(updates, 0.0)
        self.norm = 0.0

    def add(
        self, layer: MixLoraLayer, adapter: str, x: Tensor, z: Tensor, cores: Tensor, attended: Tensor | None
    ) -> None:
        counts = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if attended is None else attended
        dynamic = torch.matmul(torch.bmm(z.float(), cores.float()), layer.mixlora_B[adapter].float())[counts]
        self.norm += float(dynamic.double().square().sum())
        for method, (down, up) in self.updates.items():
            static = F.linear(F.linear(x[counts].float(), down.to(x.device)), up.to(x.device))
            self.error[method] += float((static - dynamic).double().square().sum())

    def relative(self) -> dict[str, float]:
        return {method: (error / self.norm) ** 0.5 if self.norm else 0.0 for method, error in self.error.items()}


def _predictions(model: nn.Module, batch: Batch) -> Tensor:
    """The log-probabilities that the model gives at the places of the N supervised tokens, [N, V] in float32."""
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != IGNORE_INDEX].float().log_softmax(dim=-1)


def _compare(dynamic: Tensor, static: Tensor, labels: Tensor) -> Tensor:
    """What [`Agreement`] sums up, of each of B samples, [B, 9]; predictions [N, V], labels [B, S]."""
    supervised = labels != IGNORE_INDEX
    sample = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)[supervised]
    truth, chosen, instead = labels[supervised], dynamic.argmax(dim=-1), static.argmax(dim=-1)

    def total(of_tokens: Tensor) -> Tensor:
        zeros = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        return zeros.index_add(0, sample, of_tokens.double())

    tokens = total(torch.ones_like(truth))
    told = [
        total((dynamic.exp() * (dynamic - static)).sum(dim=-1)),
        total(chosen == instead),
        *(total(F.nll_loss(scores, truth, reduction="none")) for scores in (dynamic, static)),
        tokens,
        *((total(found) == tokens).double() for found in (chosen == instead, chosen == truth, instead == truth)),
        torch.ones_like(tokens),
    ]
    return torch.stack(told, dim=1).cpu()


def _agreement(of_samples: Tensor) -> Agreement:
    divergence, same, dynamic, static, tokens, same_answer, right_dynamic, right_static, samples = of_samples.sum(
        dim=0
    ).tolist()
    return Agreement(
        kl=divergence / max(tokens, 1),
        same_token=same / max(tokens, 1),
        loss_dynamic=dynamic / max(tokens, 1),
        loss_static=static / max(tokens, 1),
        same_answer=same_answer / max(samples, 1),
        right_dynamic=right_dynamic / max(samples, 1),
        right_static=right_static / max(samples, 1),
        tokens=int(tokens),
        samples=int(samples),
    )
