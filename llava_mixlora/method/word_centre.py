"""What routers with `router_input="words"` see: the centred mean word vector of an instruction.

    w̄  = mean input embedding of the instruction's tokens                       [d_model]
    u   = (w̄ − μ) / rms(w̄ − μ)                                                  the same in every layer

μ is the mean of w̄ over the first instances of training. Without it all instructions look alike, since what they share
(a system prompt, a template) is most of w̄, and nearly all of them take one route. An instance is one answer: a turn of
a conversation or a packed sample counts by itself. A training step centres by all that was seen up to it, its own batch
included; once [`WARM_UP`] instances were seen μ stays, so routes do not drift under what the factors have learnt.

The sum of w̄ and the number of instances are a buffer of the adapted model, `mixlora_stats_words` [d_model + 1] for each
adapter, saved with it. Like the moments they hold the bits of float64 numbers as whole numbers. Processes of a training
run sum them as all statistics.
"""

from __future__ import annotations

import inspect

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..errors import MixLoraError

WORDS = "mixlora_stats_words"
WARM_UP = 512
"""Instances whose mean word vectors make μ; their mean is off by about 4% of the spread between instructions."""

ROUNDING = 2**-9
"""What is left of w̄ − μ where all instructions are one, as a share of w̄: bfloat16 word vectors are exact to that.

Brought to unit size it would draw routes at random, and anew in each process. Instructions of hundreds of words that
differ in one are twenty times as far apart.
"""


def width_of_words(model: nn.Module) -> int:
    """d_model, the width of the model's input embeddings.

    Raises:
        MixLoraError: it has none, or does not tell their width, or its decoder attends to an encoder's states.
    """
    if "decoder_input_ids" in inspect.signature(type(model).forward).parameters:
        raise MixLoraError(
            f"router_input='words': {type(model).__name__}'s decoder attends to an encoder's states, not to words; "
            "use router_input='hidden', the default with task_type='SEQ_2_SEQ_LM'"
        )
    embeddings = input_embeddings(model)
    width = getattr(embeddings, "embedding_dim", None)
    if not isinstance(width, int):
        raise MixLoraError(
            f"router_input='words': {type(model).__name__} has no input embeddings of words; expected a module with "
            "embedding_dim from get_input_embeddings(); use router_input='hidden'"
        )
    return width


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns token ids into word vectors; None where the model names none."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no transformers model, or one that has not said which they are
        return None


def add_word_sums(model: nn.Module, adapter: str, width: int) -> None:
    """Give the adapted model an empty sum for an adapter, or empty the one that it has."""
    if word_adapters(model) is None:
        model.add_module(WORDS, BufferDict(persistent=True))
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    model._modules[WORDS][adapter] = torch.zeros(width + 1, dtype=torch.int64, device=device)


def remove_word_sums(model: nn.Module, adapter: str | None = None) -> None:
    """Take away an adapter's sum, or all."""
    sums = word_adapters(model)
    if sums is not None and adapter in sums:
        del sums[adapter]
    if sums is not None and (adapter is None or not len(sums)):
        del model._modules[WORDS]


def word_adapters(model: nn.Module) -> BufferDict | None:
    """The sums of a model by adapter; None where it has none, also of what wraps such a model."""
    return model._modules.get(WORDS)  # getattr would ask what a PeftModel wraps


def word_sums(model: nn.Module, adapter: str) -> Tensor:
    """Σ w̄ over instances and, last, their number, float64 [d_model + 1]; a view of the buffer."""
    return model._modules[WORDS][adapter].view(torch.float64)


def news_of(mean: Tensor, sums: Tensor) -> Tensor:
    """What instances with `mean` w̄ [B, d_model] add to `sums`, float64 [d_model + 1]: nothing after the warm-up."""
    news = torch.cat([mean.sum(dim=0, dtype=torch.float64), mean.new_tensor([len(mean)], dtype=torch.float64)])
    return torch.where(sums[-1] < WARM_UP, news, 0)


def centred(mean: Tensor, sums: Tensor) -> Tensor:
    """u of `mean` w̄ [B, d_model], in its dtype; zero where w̄ is μ but for rounding."""
    difference = mean - (sums[:-1] / sums[-1].clamp(min=1)).to(mean.dtype)
    power = difference.square().mean(dim=-1, keepdim=True)
    differs = power > (ROUNDING**2 * mean.square().mean(dim=-1, keepdim=True))
    return difference * torch.where(differs, power.rsqrt(), 0)
