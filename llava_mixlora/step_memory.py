"""The memory of one training step, measured without doing it.

The step runs on fake tensors, which have shape and dtype but no storage: PyTorch dispatches the same operations, makes
the same graph and frees the same tensors. What is alive after each operation is added up.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

FORWARD, LAST_LAYER, FIRST_LAYER = "forward", "backward from the last layer", "backward of the first layer"

UNMASKED = "llava_mixlora_unmasked"


class TrainedLlava(nn.Module):
    """A language model with adapters, behind a frozen tower and a trained projector (or without both).

    `forward` takes images [B, 3, H, W], token ids [B, S − image tokens] and labels [B, S], and returns the loss.
    """

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

    def forward(self, images: Tensor | None, token_ids: Tensor, labels: Tensor) -> Tensor:
        embeddings = self.language.get_input_embeddings()(token_ids)
        if images is not None:
            with torch.no_grad():
                states = self.vision_tower(images, output_hidden_states=True).hidden_states
                features = states[self.select_layer][:, -self.image_tokens :]
            del states
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
    """Adds up the storages that operations make, until they are freed; `peaks` has the most for each `part`.

    `existing` tensors are not counted.
    """

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.live, self.part = 0, FORWARD
        self.peaks: dict[str, int] = defaultdict(int)
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peaks[self.part] = max(self.peaks[self.part], self.live)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


def peak_of_step(
    model: TrainedLlava, batch_size: int, sequence_length: int, checkpointing: bool, compute: torch.dtype
) -> dict[str, int]:
    """The most bytes that a step allocates in its forward pass (with the loss), and in its backward pass while the

    last, or the first, decoder layer is differentiated. Gradients exist before, as when they are accumulated. `model`
    lies on the meta device and is of no use afterwards.
    """
    with FakeTensorMode():
        _lay_out(model)
        model.train()
        language = model.language
        language.get_base_model().config._attn_implementation = UNMASKED
        if checkpointing:
            language.gradient_checkpointing_enable()
            language.enable_input_require_grads()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        images = None
        if model.vision_tower is not None:
            model.vision_tower.eval()
            size = model.vision_tower.config.image_size
            images = torch.zeros(batch_size, 3, size, size, dtype=model.vision_tower.dtype)
        token_ids = torch.zeros(batch_size, sequence_length - model.image_tokens, dtype=torch.int64)
        labels = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
        inputs = [tensor for tensor in (images, token_ids, labels) if tensor is not None]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        live = LiveBytes([*model.parameters(), *model.buffers(), *gradients, *inputs])
        _name_parts(language.get_base_model().model.layers, live)
        lower = compute != torch.float32
        with live:
            with torch.autocast("cpu", compute) if lower else nullcontext():
                loss = model(images, token_ids, labels)
            loss.backward()
    return {part: live.peaks[part] for part in (FORWARD, LAST_LAYER, FIRST_LAYER)}


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


def _name_parts(layers: nn.ModuleList, live: LiveBytes) -> None:
    def name(part: str) -> Any:
        def when_gradient_arrives(gradient: Tensor) -> None:
            live.part = part

        def after_forward(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(when_gradient_arrives)

        return after_forward

    layers[-1].register_forward_hook(name(LAST_LAYER))
    if len(layers) > 1:
        layers[0].register_forward_hook(name(FIRST_LAYER))
