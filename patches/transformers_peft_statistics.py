"""`transformers.integrations.peft`: transformers' own `load_adapter`, which since transformers 5 loads without PEFT.

`import llava_mixlora` applies these, as those of PEFT itself: they belong to the PEFT method, with LLaVA or without.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft
from torch import Tensor

from llava_mixlora.method.registration import MIXLORA
from llava_mixlora.method.tensor_names import PEFT_PREFIX

from .patch import COMPATIBILITY, Patch

OF_DOWNLOADS = ("revision", "token", "cache_dir", "subfolder", "force_download", "local_files_only")
"""What both transformers' and PEFT's loading know of how a file of the hub is fetched."""


def _load_with_statistics(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        adapter = given.arguments["adapter_name"] or "default"
        if self.peft_config[adapter].peft_type != MIXLORA:
            return loaded
        tensors = given.arguments["adapter_state_dict"]
        if tensors is None:
            tensors = _read_adapter(given.arguments)
        # All of them, and not the sums alone: the method refuses an adapter that is not whole.
        own = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        peft.set_peft_model_state_dict(self, own, adapter)
        return loaded

    return load_adapter


def _read_adapter(given: dict[str, Any]) -> dict[str, Tensor]:
    load_config = given["load_config"]
    place = given["peft_model_id"] or load_config.pretrained_model_name_or_path
    of_download = getattr(load_config, "download_kwargs", None) or {}
    options = {**of_download, **(given["adapter_kwargs"] or {}), **given["kwargs"]}
    options["local_files_only"] = given["local_files_only"]
    options = {name: options[name] for name in OF_DOWNLOADS if options.get(name)}
    return peft.load_peft_weights(str(place), device="cpu", **options)


PATCHES = (
    Patch(
        "transformers.integrations.peft:PeftAdapterMixin.load_adapter",
        kind=COMPATIBILITY,
        why="this transformers asks no method for its tensors, and cuts the sums of the statistics to whole numbers",
        replace=_load_with_statistics,
        parameters=("peft_model_id", "adapter_name", "adapter_state_dict", "load_config", "adapter_kwargs"),
        requires={"transformers": ">=5"},
    ),
)
