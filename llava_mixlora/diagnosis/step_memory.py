"""The memory of one training step, measured without doing it.

The step runs on fake tensors, which have shape and dtype but no storage: PyTorch dispatches the same operations, makes
the same graph and frees the same tensors. What is alive after each operation is added up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import MixLoraError
from ..method.forward_passes import current_scope

try:
    from transformers import AttentionInterface
except ImportError:
    raise MixLoraError(
        "--estimate needs transformers 4.48 or newer, to run a step on shapes alone; run it in another environment: it "
        "needs no LLaVA, and what it says holds for older transformers too"
    ) from None

MEASURED_LAYERS = 2
"""The decoder layers that a model needs for [`peak_of_step`] to tell what any number of them takes."""

UNMASKED = "llava_mixlora_unmasked"


class TrainedLlava(nn.Module):
    """A language model with adapters, behind a frozen tower and a trained projector (or without both)."""

    def __init__(
        self,
        language: nn.Module,
        vision_tower: nn.Module | None,
        mm_projector: nn.Module | None,
        select_layer: int,
        image_tokens: int,
    ) -> None:
        super().__init__()
        self.language = language
        self.vision_tower = vision_tower
        self.mm_projector = mm_projector
        self.select_layer, self.image_tokens = select_layer, image_tokens

    def forward(self, features: Tensor | None, token_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss of features [B, image tokens, d of the tower], token ids [B, S − image tokens], labels [B, S]."""
        embeddings = self.language.get_input_embeddings()(token_ids)
        if features is not None:
            projected = self.mm_projector(features.to(embeddings.dtype))
            embeddings = torch.cat([projected.to(embeddings.dtype), embeddings], dim=1)
        return self.language(inputs_embeds=embeddings, labels=labels).loss


class QuantizedLinear(nn.Module):
    """Stands for bitsandbytes' Linear4bit or Linear8bitLt: allocates what they do. The weight counts for its shape."""

    def __init__(self, linear: nn.Linear, bits: int, compute: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.compute = bits, compute
        self.weight = nn.Parameter(linear.weight.to(compute), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 8:
            return _Dequantized.apply(x, self.weight, self.bias, True)
        return _Dequantized.apply(x.to(self.compute), self.weight, self.bias, False).to(x.dtype)


class _Dequantized(torch.autograd.Function):
    """x Wᵀ with W made whole for the moment, in the forward and in the backward pass. 8-bit layers keep x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.weight, ctx.kept = weight, x if keeps_input else None
        whole = weight.to(x.dtype, copy=True)
        return nn.functional.linear(x, whole, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        whole = ctx.weight.to(gradient.dtype, copy=True)
        return torch.matmul(gradient, whole), None, None, None


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed: `live` now, `peak` at most.

    `existing` tensors are not counted.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


def peak_of_encoding(tower: nn.Module, batch_size: int) -> int:
    """The most bytes that a CLIP tower on the meta device allocates for a batch of images, before the step goes on."""
    with FakeTensorMode():
        _lay_out(tower)
        size = tower.config.image_size
        images = torch.zeros(batch_size, 3, size, size, dtype=tower.dtype)
        with LiveBytes([*tower.parameters(), *tower.buffers(), images]) as live, torch.no_grad():
            tower(images, output_hidden_states=True)
    return live.peak


def peak_of_step(
    model: TrainedLlava, depth: int, batch_size: int, sequence_length: int, checkpointing: bool, compute: torch.dtype
) -> int:
    """The most bytes that a step allocates after its images are encoded, in a model like this one of `depth` layers.

    `model` has `depth` decoder layers, or two for any number above: at the peak, every further layer holds what the
    last of the two has kept for the backward pass. (With 4 bits the first layer may have the peak of the two; then this
    is one hidden state too many.) Gradients exist before, as when they are accumulated. `model` lies on the meta device
    and is of no use afterwards.
    """
    with FakeTensorMode():
        language, decoder = model.language, model.language.get_base_model().model
        _lay_out(language)
        if model.mm_projector is not None:
            _lay_out(model.mm_projector)
        language.train()
        language.get_base_model().config._attn_implementation = UNMASKED
        if checkpointing:
            language.gradient_checkpointing_enable()
            language.enable_input_require_grads()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained]
        token_ids = torch.zeros(batch_size, sequence_length - model.image_tokens, dtype=torch.int64)
        labels = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
        live = LiveBytes([*model.parameters(), *model.buffers(), *gradients, token_ids, labels])
        alive_before: dict[nn.Module, int] = {}

        def note(module: nn.Module, args: Any) -> None:
            if module in alive_before:  # a checkpointed layer runs again, where no forward pass is open
                return
            statistics = current_scope().statistics  # which are gone in the backward pass
            alive_before[module] = (
                live.live - statistics.made_bytes - (statistics.waiting_bytes if checkpointing else 0)
            )

        decoder.layers[-1].register_forward_pre_hook(note)
        decoder.norm.register_forward_pre_hook(note)
        # Backward has the peak: autocast has let its copies of the weights go by then.
        cast = torch.autocast("cpu", compute, enabled=compute != torch.float32, cache_enabled=False)
        with live:
            with cast:
                loss = model(_features(model, batch_size), token_ids, labels)
            loss.backward()
    kept = alive_before[decoder.norm] - alive_before[decoder.layers[-1]]
    return live.peak + (depth - len(decoder.layers)) * kept


def _features(model: TrainedLlava, batch_size: int) -> Tensor | None:
    if model.vision_tower is None:
        return None
    config = model.vision_tower.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    state = torch.zeros(batch_size, tokens, config.hidden_size, dtype=model.vision_tower.dtype)
    return state[:, -model.image_tokens :]  # LLaVA selects a view: the class token's place is kept too


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention without a mask, [B, heads, S, d] → [B, S, heads, d].

    transformers' own looks at the mask's values to leave it out, and fake tensors have none.
    """
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    gqa = query.shape[1] != key.shape[1]
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=gqa
    )
    return attended.transpose(1, 2), None


AttentionInterface.register(UNMASKED, _attend)


def _lay_out(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU, in which autocast and attention choose as in a real run."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
