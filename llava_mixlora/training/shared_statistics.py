"""Routing statistics of all processes of a training run, the same in each of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import MixLoraError
from ..method.layer import MixLoraLayer
from ..method.shared_sums import kinds_of, remember, shared_by, statistics_of


@torch.no_grad()
def share_statistics(model: nn.Module, group: distributed.ProcessGroup | None = None) -> None:
    """Make the statistics in a model's layers sum what every process has seen, not only this one.

    While it trains, each process counts its own instances; this adds what the others have counted since the last call,
    so whichever process saves afterwards, the counts are those of one process that saw all the data. Counts that every
    process has loaded are no news and are not summed; without news, nothing changes. Every process has to call it,
    between two steps of training and not in the middle of one. It needs no Trainer, and does nothing in one process.

    Args:
        model: a PeftModel, or what wraps one, such as DistributedDataParallel or FSDP.
        group: the processes that see different data, where that is not all of them.

    Raises:
        MixLoraError: the model has no MixLoRA layers.
    """
    statistics = list(statistics_of(model))
    if not any(isinstance(owner, MixLoraLayer) for owner, *_ in statistics):
        raise MixLoraError(
            f"share_statistics: {type(model).__name__} has no MixLoRA layers; expected a model of get_peft_model(), or "
            "what wraps one"
        )
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size(group) == 1:
        return
    _warn_of_broadcasts(model)
    pairs = []  # what this process has of each sum, and what every process has of it
    for owner, adapter, ours in statistics:
        shared = shared_by(owner, adapter) or tuple(torch.zeros_like(mine) for mine in ours)
        remember(owner, adapter, tuple(each.to(mine.device, copy=True) for each, mine in zip(shared, ours)))
        pairs += zip(ours, shared_by(owner, adapter))
    for dtype in (torch.int64, torch.float64):  # counts, then sums
        ours, before = zip(*(pair for pair in pairs if pair[0].dtype == dtype))
        device = _device_of_news(ours[0], group)
        in_all = _in_a_row(before, device)
        news = _in_a_row(ours, device) - in_all
        distributed.all_reduce(news, group=group)
        in_all += news
        summed = [part.view_as(mine) for part, mine in zip(in_all.split([mine.numel() for mine in ours]), ours)]
        torch._foreach_copy_(ours, summed)
        torch._foreach_copy_(before, summed)


def leave_to_each_process(model: nn.Module) -> None:
    """Keep DistributedDataParallel, which is yet to wrap the model, from overwriting what processes have counted.

    It would give all of them the counts of the first, possibly in the middle of a step. A PeftModel says so by itself,
    unless a program has listed names of its own for it; a module around one does not.
    """
    names = _statistics_in(model)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    if not names <= set(ignored):
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*ignored, *sorted(names)])


def _warn_of_broadcasts(model: nn.Module) -> None:
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if any(each.broadcast_buffers and _statistics_in(each.module) - each.parameters_to_ignore for each in wrappers):
        warnings.warn(
            "DistributedDataParallel broadcasts the buffers of the first process, the statistics of MixLoRA among "
            "them, which lose what other processes count; make it with broadcast_buffers=False",
            stacklevel=3,
        )


def _statistics_in(model: nn.Module) -> set[str]:
    return {
        f"{name}.{kind}.{adapter}".lstrip(".")
        for name, module in model.named_modules()
        for kind in kinds_of(module)
        for adapter in getattr(module, kind)
    }


def _device_of_news(sums: Tensor, group: distributed.ProcessGroup | None) -> torch.device:
    if sums.device.type == "cpu" and distributed.get_backend(group) == "nccl":  # which sums on a GPU only
        return torch.device("cuda", torch.cuda.current_device())
    return sums.device


def _in_a_row(sums: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([of_layer.flatten().to(device) for of_layer in sums])
