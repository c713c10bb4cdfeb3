"""The PEFT tuner that puts MixLoRA layers into a model."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from torch import Tensor, distributed, nn

from ..errors import MixLoraError
from . import forward_passes
from .config import MixLoraConfig
from .default_targets import decoder_of, default_targets
from .layer import MixLoraLayer, MixLoraLinear
from .layer_merging import LOSSY
from .layer_settings import LayerSettings
from .lora_only import OfLoraModels
from .mixture import Route
from .offloading import bring_back, device_of_adapter
from .other_llava import says_of
from .prompt_lora import PromptLora, lora_of_core
from .registration import BaseTuner, BaseTunerLayer
from .shared_sums import follow_loading, has_counted
from .stored_tensors import Widths, check_finite, check_known, check_tensors, forms_of, named
from .tensor_names import PEFT_PREFIX
from .unpickling import know_outputs_to_record
from .word_centre import (
    WORDS,
    add_word_sums,
    input_embeddings,
    remove_word_sums,
    width_of_words,
    word_adapters,
    word_sums,
)

USAGE, MOMENTS = "mixlora_stats_usage", "mixlora_stats_moments"
LLAMA_LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = "default"
"""The name that PEFT gives to a model's only adapter."""
BASE_MODEL = "__base__"
"""PEFT's name, in `adapter_names`, for an instance without an adapter."""


class MixLoraModel(OfLoraModels, BaseTuner):
    """A model whose targeted linear layers are [`MixLoraLayer`]s; made by `peft.get_peft_model`.

    Raises:
        ValueError: no module matches `target_modules`, or it is unset and the base model has no decoder.
        TypeError: a targeted module is not a linear layer.
    """

    prefix = "mixlora_"
    tuner_layer_cls = MixLoraLayer
    # Of models without a decoder, also where a program enters its own into the table later.
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        know_outputs_to_record(self)

    def routes(self, adapter_name: str = "default") -> dict[str, Route]:
        """The route that each adapted layer took in its last forward pass, by layer name (see [`Route`])."""
        return {
            name: route
            for name, module in self.model.named_modules()
            if isinstance(module, MixLoraLayer) and (route := module.last_routes.get(adapter_name)) is not None
        }

    @torch.no_grad()
    def routes_of_words(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, adapter_name: str = "default"
    ) -> dict[str, Route]:
        """The routes that prompts will take, without running the model: `router_input="words"` knows them beforehand.

        Prompts of one route are served by one plain LoRA of rank r, so this tells which may share it. `input_ids` int64
        [B, S], `attention_mask` [B, S], zero at padding; tokens that stand for images are left out, LLaVA's -200 too.

        Raises:
            MixLoraError: the adapter's routers see hidden states, or a prompt has no text.
        """
        config = self.peft_config[adapter_name]
        if config.router_input != "words":
            raise MixLoraError(
                f"adapter {adapter_name!r} routes by hidden states, which only running the model makes; expected "
                "router_input='words'"
            )
        if (input_ids < 0).any():
            is_word = input_ids >= 0
            attention_mask = is_word if attention_mask is None else is_word & (attention_mask != 0)
            input_ids = input_ids.clamp(min=0)
        scope = forward_passes.scope_of_prompts(self.model, input_ids, attention_mask)
        scope.see_words(self.model.get_input_embeddings()(input_ids))
        words = scope.words(adapter_name, config.router_scope)
        scope.require_text("router_input='words'")
        return {
            name: module.route_of(words, adapter_name)
            for name, module in self.model.named_modules()
            if isinstance(module, MixLoraLayer) and adapter_name in module.mixlora_A
        }

    def lora_of_prompt(self, adapter_name: str = "default", **inputs: Any) -> PromptLora:
        """The update of one prompt as a plain LoRA of rank r (see [`PromptLora`]); exact for the prompt and its answer.

        Arguments and errors are those of [`loras_of_prompts`], of a batch of one.
        """
        loras = self.loras_of_prompts(adapter_name, **inputs)
        if len(loras) != 1:
            raise MixLoraError(f"lora_of_prompt: got {len(loras)} prompts; expected one, or call loras_of_prompts")
        return loras[0]

    @torch.no_grad()
    def loras_of_prompts(self, adapter_name: str = "default", **inputs: Any) -> list[PromptLora]:
        """The update of each prompt of a batch as a plain LoRA of rank r, from one forward pass of the prompts.

        With `router_input="words"` nothing is run where the `inputs` are `input_ids` and `attention_mask` alone (see
        [`routes_of_words`]): pictures change no route then, so leave them out.

        Args:
            adapter_name: of a MIXLORA adapter of this model.
            inputs: what the model's forward takes of B prompts, without labels.

        Returns:
            For each prompt by layer name (as the base model knows it) A' [r, d_in] and B' [d_out, r].

        Raises:
            MixLoraError: there is no such adapter, the model is in training mode, the adapter routes each step anew
                (`decode_routing="step"`), or a conversation's questions have routes of their own.
        """
        self._check_has_loras(adapter_name)
        given = {name for name, value in inputs.items() if value is not None}
        if self.peft_config[adapter_name].router_input == "words" and given <= {"input_ids", "attention_mask"}:
            cores, prompts = self._cores_of_words(adapter_name, **inputs), len(inputs["input_ids"])
        else:
            cores, prompts = self._cores_of_prefill(adapter_name, inputs)
        layers = adapted_layers(self.model, adapter_name)
        return [
            {name: lora_of_core(layer, adapter_name, cores[name][prompt]) for name, layer in layers.items()}
            for prompt in range(prompts)
        ]

    def _check_has_loras(self, adapter_name: str) -> None:
        self._check_adapter_names([adapter_name])
        if adapter_name == BASE_MODEL:
            raise MixLoraError(
                f"{BASE_MODEL} is the model without an adapter; expected one of {', '.join(self.peft_config)}"
            )
        if self.peft_config[adapter_name].decode_routing != "prefill":
            raise MixLoraError(
                f"adapter {adapter_name!r} routes every step of a generation anew (decode_routing='step'), so no one "
                "LoRA is its update of a prompt; only decode_routing='prefill' has that"
            )

    def _cores_of_words(self, adapter_name: str, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        layers = adapted_layers(self.model, adapter_name)
        return {
            name: layers[name].core_of(route, adapter_name)
            for name, route in self.routes_of_words(input_ids, attention_mask, adapter_name).items()
        }

    def _cores_of_prefill(self, adapter_name: str, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
        prompts = len(next(value for name in ("inputs_embeds", "input_ids") if (value := inputs.get(name)) is not None))
        with (
            forward_passes.named_adapters(self.model, [adapter_name] * prompts),
            forward_passes.generation() as held,
        ):
            self.model(**inputs)
        routes = held()
        layers = adapted_layers(self.model, adapter_name)
        found = {name: routes.cores.get((layer.identity, adapter_name)) for name, layer in layers.items()}
        if missing := [name for name, core in found.items() if core is None]:
            raise MixLoraError(
                f"{missing[0]} was not run on the prompt's sequence, as {len(missing)} of {len(layers)} layers were "
                "not, so its update of this prompt is not known; adapt the language model's layers alone"
            )
        if any(len(core) != prompts for core in found.values()):
            raise MixLoraError(
                "the questions of a conversation have routes of their own, so no one LoRA is its update; expected "
                "prompts of one question each"
            )
        return found, prompts

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel leaves to each process, under its names here, in a PeftModel and in the model.

        It would overwrite what other processes have counted with what the first has, in each forward pass.
        """
        chosen = self.__dict__.get("_chosen_for_ddp", getattr(self.model, "_ddp_params_and_buffers_to_ignore", ()))
        names = [name for adapter in self.peft_config for name in _statistics(self.model, adapter)]
        return [*chosen, *(prefix + name for prefix in (PEFT_PREFIX, "model.", "") for name in names)]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Iterable[str]) -> None:
        self.__dict__["_chosen_for_ddp"] = list(names)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MixLoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT looks for the layers' tensors under the layers' names, wrappers included, and would save none of them.
        wrapped = {_unwrapped(name): name for name, _ in model.named_modules()}
        by_place = {key: key.rpartition(".") for key in state_dict}
        named = {f"{wrapped.get(owner, owner)}{dot}{leaf}": state_dict[k] for k, (owner, dot, leaf) in by_place.items()}
        selected = super()._get_adapter_state_dict(model, config, adapter_name, named, unwanted_adapter_names)
        selected = {_unwrapped(name): tensor for name, tensor in selected.items()}
        _warn_of_counts_of_one_process(model, adapter_name)
        # LLaVA's train() hands in a state dict of parameters only; the statistics are buffers.
        return {**selected, **_statistics(model, adapter_name)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MixLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        _check_fits(model, config, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        statistics = _statistics(model, adapter_name)
        words = {}  # PEFT looks for what it loads in layers, and the sums of words are the model's
        for name in (name for name in statistics if WORDS in name):
            saved = name.removesuffix(f".{adapter_name}")
            words[saved] = words[PEFT_PREFIX + saved] = name
        # Adapters that were saved without statistics are complete; PEFT would warn of missing weights.
        complete = {**statistics, **{words.get(name, name): value for name, value in remapped.items()}}
        of_floats = (MOMENTS, WORDS)
        return {
            name: value.view(torch.int64) if any(kind in name for kind in of_floats) else value
            for name, value in complete.items()
        }

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Run the body, a forward pass or a generation, with one adapter per instance; PEFT's models call it.

        Raises:
            ValueError: the model is in training mode, or an adapter does not exist.
        """
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        self._follow_adapter_names()
        with forward_passes.named_adapters(self.model, adapter_names):
            yield

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        if self.training:
            raise MixLoraError(
                "Cannot pass `adapter_names` when the model is in training mode. Call eval() first, or set_adapter()"
            )
        if unknown := sorted(set(adapter_names) - {BASE_MODEL, *self.peft_config}):
            raise MixLoraError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; expected {BASE_MODEL} or one of "
                f"{', '.join(self.peft_config)}"
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT puts new parameters in the place of half precision ones, and what was frozen would train.
        trains = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        for layer in self._layers():
            bring_back(layer)  # PEFT has just sent them where the model's device map sends the base
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains[name])
        self._follow_adapter_names()  # PEFT has just wrapped the modules to save, and no other thread runs the model

    def _follow_adapter_names(self) -> None:
        """Let modules that are trained in full choose by the adapter names of the forward pass that they run in."""
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper) and _name_adapters not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_name_adapters, with_kwargs=True)

    def _prepare_adapter_config(self, peft_config: MixLoraConfig, model_config: dict[str, Any]) -> MixLoraConfig:
        if peft_config.target_modules is None:
            # The paper adapts every linear layer of the language model (section 4.2, "Implementation Details").
            found = default_targets(self.model, by_index=peft_config.layers_to_transform is not None)
            if found is None and model_config.get("model_type") not in self.target_module_mapping:
                raise MixLoraError(
                    f"target_modules is unset, and {type(self.model).__name__} has no decoder (get_decoder) whose "
                    "linear layers to take; name the layers to adapt, such as target_modules=['q_proj', 'v_proj']"
                )
            peft_config.target_modules = found
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Put an adapter's layers into the model, and what they need around them."""
        config = self.peft_config[adapter_name]
        all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
        try:
            result = super().inject_adapter(model, adapter_name, *args, **kwargs)
        except MixLoraError:
            raise
        except ValueError as error:  # PEFT finds nothing to adapt
            targets = config.target_modules
            names = [targets] if isinstance(targets, str) else targets or ()
            reason = says_of(names, type(model).__name__, dict(model.named_modules())) or error
            raise MixLoraError(f"adapter {adapter_name!r} does not fit {type(model).__name__}: {reason}") from error
        if all_linear:
            _tell_of_towers(model, adapter_name)
        if config.router_input == "words":
            add_word_sums(model, adapter_name, width_of_words(model))
            follow_loading(model, adapter_name)
        forward_passes.attach(model, adapter_name, config.router_scope, config.router_input)
        return result

    def _create_and_replace(
        self,
        config: MixLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        settings = LayerSettings.from_config(
            config,
            r=config.rank_of(current_key),
            lora_alpha=config.alpha_of(current_key),
            seed=zlib.crc32(current_key.encode()),
            word_width=width_of_words(self.model) if config.router_input == "words" else None,
        )
        device = device_of_adapter(getattr(target, "base_layer", target), self.model)
        if isinstance(target, MixLoraLayer):
            target.update_layer(adapter_name, config, settings, device)
            follow_loading(target, adapter_name)
            return
        layer = MixLoraLinear(target, adapter_name, config, settings)
        layer.is_expert = ".experts." in current_key
        self._replace_module(parent, target_name, layer, target)
        if device is not None:  # PEFT has just sent the adapter after the weight, which is nowhere
            layer.update_layer(adapter_name, config, settings, device)
        follow_loading(layer, adapter_name)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the static updates of adapters (the active ones) to the base; `unmerge_adapter` takes them back.

        Raises:
            MixLoraError: a layer has no statistics to make a static update from, or a merged weight is not finite; then
                nothing is merged.
        """
        self._check_static_updates(adapter_names)
        self._warn_of_loss(adapter_names)
        unmerged = [layer for layer in self._layers() if not layer.merged]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except MixLoraError:
            for layer in unmerged:
                if layer.merged:
                    layer.unmerge()
            raise

    def _check_static_updates(self, adapter_names: list[str] | None) -> None:
        for layer in self._layers():
            bring_back(layer)
            for adapter in layer.active_adapters if adapter_names is None else adapter_names:
                if adapter in layer.mixlora_A:
                    layer.static_update(adapter)

    def _warn_of_loss(self, adapter_names: list[str] | None) -> None:
        errors: dict[str, list[float]] = {}
        for layer in self._layers():
            for adapter in layer.active_adapters if adapter_names is None else adapter_names:
                error = layer.static_error(adapter) if adapter in layer.mixlora_A else None
                if error is not None:
                    errors.setdefault(adapter, []).append(error)
        for adapter, of_layers in errors.items():
            mean = sum(of_layers) / len(of_layers)
            if mean > LOSSY:
                warnings.warn(
                    f"merging adapter {adapter!r} loses: over the training data its static update misses {mean:.0%} of "
                    "the dynamic one (mean of the layers); `llava-mixlora merge` makes a better one from data, and "
                    "measures it",
                    stacklevel=4,
                )

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of all layers."""
        super().delete_adapter(adapter_name)
        forward_passes.companions.forget(self.model)
        remove_word_sums(self.model, adapter_name)

    def _layers(self) -> list[MixLoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, MixLoraLayer)]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_static_updates(adapter_names)
            self._warn_of_loss(adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            forward_passes.detach(model)
            remove_word_sums(model)
        return model


def _tell_of_towers(model: nn.Module, adapter: str) -> None:
    decoder = decoder_of(model)
    if decoder is None:
        return
    outside = [name for name in adapted_layers(model, adapter) if not name.startswith(decoder[0])]
    if outside:
        warnings.warn(
            f"target_modules='all-linear' takes {len(outside)} linear layers outside of the language model's decoder "
            f"too, {outside[0]} among them; leave target_modules unset to adapt the decoder alone, or name them in "
            "exclude_modules",
            stacklevel=2,
        )


def adapted_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, MixLoraLayer]:
    """The layers of a PeftModel that have the adapter, by the name that the base model knows them by."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, MixLoraLayer) and adapter in module.mixlora_A
    }


def _name_adapters(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    scope = forward_passes.current_scope()
    if scope is None or scope.adapter_names is None:
        return None
    return args, {**kwargs, "adapter_names": list(scope.adapter_names)}


def _statistics(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """By name: the counts of choices, and the other sums as the float64 numbers that their bits are."""
    statistics = {}
    for name, module in model.named_modules():
        if adapter_name in (word_adapters(module) or ()):
            statistics[f"{_unwrapped(name)}.{WORDS}.{adapter_name}".lstrip(".")] = word_sums(module, adapter_name)
        if isinstance(module, MixLoraLayer) and adapter_name in module.mixlora_stats_usage:
            moments = module.mixlora_stats_moments[adapter_name].view(torch.float64)
            for kind, value in ((USAGE, module.mixlora_stats_usage[adapter_name]), (MOMENTS, moments)):
                statistics[f"{_unwrapped(name)}.{kind}.{adapter_name}".lstrip(".")] = value
    return statistics


def _check_fits(model: nn.Module, config: MixLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse an adapter that lacks tensors of this model's layers, or has other ones, or numbers that are none."""
    place = f"the adapter {adapter_name!r}"
    modules = {_unwrapped(name).removeprefix(PEFT_PREFIX): module for name, module in model.named_modules()}
    layers = {
        name: Widths(module.in_features, module.out_features, module.settings[adapter_name].router_width)
        for name, module in modules.items()
        if isinstance(module, MixLoraLayer) and adapter_name in module.mixlora_A
    }
    if (reason := says_of(state_dict, "the model", modules)) is not None:
        raise MixLoraError(f"{place} does not fit: {reason}")
    embeddings = _saved_embeddings(model, modules, state_dict)
    found = {name: tensor for name, tensor in state_dict.items() if name not in embeddings}
    widths = [widths.router for widths in layers.values()]
    check_tensors(config, forms_of(found), place, layers, widths[0] if widths else None)
    owners = {name: name.removeprefix(PEFT_PREFIX).rpartition(".")[0] for name in state_dict if "mixlora_" not in name}
    check_known(state_dict, place, [name for name, owner in owners.items() if owner not in modules])
    check_finite(state_dict.items(), place)


def _saved_embeddings(model: nn.Module, modules: dict[str, nn.Module], saved: Iterable[str]) -> set[str]:
    """The embeddings of words and of the output, which PEFT saves, both, where a model has got new tokens."""
    of_words, of_output = input_embeddings(model), getattr(model, "get_output_embeddings", lambda: None)()
    both = {f"{name}.weight" for name, module in modules.items() if module in (of_words, of_output)}
    found = {name for name in saved if name.removeprefix(PEFT_PREFIX) in both}
    if not found or len(found) < len(both):
        return set()
    warnings.warn(
        f"the adapter brings embeddings of its own, which take the place of the model's: {named(sorted(found))}",
        stacklevel=2,
    )
    return found


def _unwrapped(name: str) -> str:
    """A module's name in a state dict, which leaves out the wrappers of FSDP and of PyTorch's checkpointing."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def _warn_of_counts_of_one_process(model: nn.Module, adapter_name: str) -> None:
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if processes > 1 and has_counted(model, adapter_name):
        warnings.warn(
            f"adapter {adapter_name!r} is saved with the statistics of one of {processes} processes; before saving, "
            "call llava_mixlora.share_statistics(model) in every process, or give a Trainer "
            "callbacks=[llava_mixlora.RoutingCallback()]",
            stacklevel=2,
        )
