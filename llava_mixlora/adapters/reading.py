"""The one door through which adapters come in: whole, of one kind and finite, or refused in one line.

What is cheap comes first, so that nothing is allocated for what does not fit: sizes and types of the JSON files, then
names, shapes and dtypes of all tensors, as the header of their file tells them, against the configuration, the
adapter's `config.json` and, where it is at hand, the base's; then the numbers, one tensor after the other. PEFT's own
`from_pretrained` asks the same of MIXLORA adapters (`method.stored_tensors`), as far as it knows of a LLaVA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from ..errors import MixLoraError
from ..inputs import expanded
from ..method.other_llava import says_of_names
from ..method.patterns import check_pattern
from ..method.registration import MIXLORA
from ..method.stored_tensors import (
    PART,
    Form,
    Widths,
    check_finite,
    check_tensors,
    forms_in,
    forms_of,
)
from ..method.tensor_names import PEFT_PREFIX
from ..own_files import own_file
from .adapter_folder import (
    NON_LORA_TRAINABLES,
    SAFE_NON_LORA_TRAINABLES,
    TOKENIZER_FILES,
    read_config,
    read_fields,
    read_non_lora_trainables,
    weights_of,
)
from .adapter_record import RECORD
from .beside_check import check_trained_beside
from .config_file import config_file, config_of
from .expected_layers import IN_DECODER, decoder_layers, targeted
from .llava_config import read_llava_config
from .pickles import read_state_dict
from .plain_lora import LARGEST_RANK, LORA, MARKER, OF_LORA, check_lora

OF_TRAINING = (RECORD, "trainer_state.json")


@dataclass(frozen=True)
class Adapter:
    """A checked adapter.

    `config`: that of PEFT. `forms`: those of its tensors by their stored names. `llava`: what its `config.json` says,
    None where it has none. `beside`: what was trained beside it, keyed as in the bare LLaVA.
    """

    folder: Path
    config: Any
    forms: dict[str, Form]
    llava: dict[str, Any] | None
    beside: dict[str, Tensor]

    @property
    def is_mixlora(self) -> bool:
        """Whether it is a MIXLORA adapter, and not LLaVA's plain LoRA."""
        return self.config.peft_type == MIXLORA

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors by their stored names, one after the other."""
        return _tensors(self.folder)


def read(folder: str | Path, base: str | None = None, to_load: bool = False) -> Adapter:
    """Check the adapter in a folder, MIXLORA or LLaVA's plain LoRA, and what was trained beside it.

    Args:
        folder: as LLaVA's training leaves it, or as PEFT saves an adapter; its hub snapshot too.
        base: the model that it is to be loaded on, a folder or a hub name, whose `config.json` it is compared with.
        to_load: PEFT is about to load it, and then looks at the numbers of a MIXLORA adapter itself.

    Raises:
        MixLoraError: it is damaged, lacks tensors (unless that is allowed: `stored_tensors.allowing_incomplete`) or has
            further ones, does not fit its configuration or the base, or holds numbers that are none, or code.
    """
    folder = Path(folder)
    for name in TOKENIZER_FILES:
        own_file(folder, name)
    config, llava, of_base = read_any_config(folder), read_llava_config(folder), _config_of_base(base)
    file = _weights(folder)
    forms = forms_in(file) if file.suffix == ".safetensors" else forms_of(read_state_dict(file))
    _check_tensors(config, forms, of_base if llava is None else llava, file)
    adapter = Adapter(folder, config, forms, llava, _beside(folder, config, llava, of_base))
    if not (to_load and adapter.is_mixlora):
        check_finite(adapter.tensors(), file)
    return adapter


def read_beside(folder: str | Path, config: Any) -> dict[str, Tensor]:
    """What was trained beside an adapter that PEFT has read, checked as [`read`] does; empty where nothing lies there.

    `config`: the adapter's, of PEFT.

    Raises:
        MixLoraError: as [`read`], of these files.
    """
    return _beside(Path(folder), config, read_llava_config(folder), None)


def read_mixlora(folder: str | Path) -> Adapter:
    """As [`read`], of a MIXLORA adapter and no other.

    Raises:
        MixLoraError: as [`read`], or it is of another type.
    """
    read_config(folder)
    return read(folder)


def check_is_of_upstream(adapter: Adapter) -> None:
    """Refuse an adapter of transformers' own LLaVA where upstream's is loaded or written.

    Raises:
        MixLoraError: says which command makes one that fits.
    """
    if reason := says_of_names(adapter.forms, "what is asked for", is_native=False):
        raise MixLoraError(f"{adapter.folder}: {reason}")


def read_any_config(folder: str | Path) -> Any:
    """The PEFT configuration of an adapter, MIXLORA or another.

    Raises:
        MixLoraError: it is damaged, or names layers by expressions that may never end.
    """
    fields = read_fields(folder)
    kind = fields.get("peft_type")
    if kind == MIXLORA.value:
        return read_config(folder)
    file = Path(folder) / CONFIG_NAME
    try:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(fields.get(name), str):
                check_pattern(name, fields[name])
        for name in ("rank_pattern", "alpha_pattern"):
            for key in fields.get(name) or ():
                check_pattern(f"{name}[{key!r:.80}]", key, r"(.*\.)?({})$")
        if kind == LORA and not (type(fields.get("r")) is int and 1 <= fields["r"] <= LARGEST_RANK):
            raise MixLoraError(f"r={repr(fields.get('r'))[:100]}: expected a whole number of at least 1")
        if kind is None:
            raise MixLoraError("peft_type=None: expected the type of an adapter; copy it again")
        taken = {name: value for name, value in fields.items() if name in OF_LORA} if kind == LORA else fields
        return PeftConfig.from_peft_type(**taken)
    except MixLoraError as error:
        raise MixLoraError(f"{file}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MixLoraError(
            f"{file} describes no adapter that PEFT knows (peft_type={repr(kind)[:100]}: {reason}); copy it again"
        ) from error


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    file = _weights(folder)
    if file.suffix != ".safetensors":
        yield from read_state_dict(file).items()
        return
    with safe_open(str(file), framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no dictionary
            yield name, stored.get_tensor(name)


def _weights(folder: Path) -> Path:
    """The adapter's file; LoRAs of older versions of PEFT have a pickled one."""
    pickled = own_file(folder, WEIGHTS_NAME)
    if pickled is None or own_file(folder, "adapter_model.safetensors") is not None:
        return weights_of(folder)
    if read_fields(folder).get("peft_type") == MIXLORA.value:
        return weights_of(folder)
    return pickled


def _config_of_base(base: str | None) -> dict[str, Any] | None:
    if base is None:
        return None
    place = expanded(base)
    if place.is_dir() and config_file(base) is None:
        raise MixLoraError(f"base model {base}: it has no config.json; expected the folder of a model")
    return config_of(base)


def _check_tensors(config: Any, forms: Mapping[str, Form], of_model: Mapping[str, Any] | None, file: Path) -> None:
    """Compare an adapter's tensors with its configuration and with the model that `of_model` describes."""
    is_mixlora = config.peft_type == MIXLORA
    if not is_mixlora and config.peft_type != LORA:  # of which nothing is known here, and no command loads it
        return
    known = None if of_model is None else decoder_layers(of_model)
    if known is not None and (reason := says_of_names(forms, f"a {of_model['model_type']}", is_native=False)):
        raise MixLoraError(f"{file}: {reason}")
    wanted = None if known is None else targeted(config, known)
    found = {name.removeprefix(PEFT_PREFIX): form for name, form in forms.items()}
    layers = None
    if wanted is not None:
        marker = PART if is_mixlora else MARKER
        stored = dict.fromkeys(name.partition(marker)[0] for name in found if marker in name)
        others = {name: Widths(None, None, None) for name in stored if not IN_DECODER.fullmatch(name)}
        layers = {**wanted, **others}
    if is_mixlora:
        width = (of_model or {}).get("hidden_size")
        check_tensors(config, found, file, layers, width if type(width) is int else None)
    else:
        check_lora(config, found, file, layers)


def _beside(
    folder: Path, config: Any, llava: Mapping[str, Any] | None, of_base: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    beside, place = read_non_lora_trainables(folder), _beside_file(folder)
    is_of_the_authors = getattr(config, "router_gradient", None) == "none"
    check_trained_beside(beside, place, llava, of_base, _is_of_training(folder, llava), is_of_the_authors)
    check_finite(beside.items(), place)
    return beside


def _is_of_training(folder: Path, llava: Mapping[str, Any] | None) -> bool:
    """Whether LLaVA's training wrote an adapter: it notes flags of its own, and this plugin's record and state."""
    return "freeze_mm_mlp_adapter" in (llava or {}) or any((folder / name).is_file() for name in OF_TRAINING)


def _beside_file(folder: Path) -> Path:
    safe = folder / SAFE_NON_LORA_TRAINABLES
    return safe if safe.exists() else folder / NON_LORA_TRAINABLES
