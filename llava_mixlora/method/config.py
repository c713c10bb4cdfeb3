"""The configuration of a MixLoRA adapter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..errors import MixLoraError
from ..inputs import read_json
from ..limits import how_to_raise, limits
from ..writing import follow_umask
from .field_kinds import OF_ANY_ADAPTER, TASK_TYPE, TRUTH, check_kinds, is_number, is_whole
from .model_card import TrainingRecord, write_card
from .patterns import check_pattern
from .registration import MIXLORA, PeftConfig
from .stored_tensors import check_beside

ROUTINGS = ("ifs_cfs", "ifs", "random")
ROUTER_GRADIENTS = ("straight_through", "none")
ROUTER_INITS = ("uniform", "zero")
ROUTER_SCOPES = ("prompt", "sequence", "instruction")
ROUTER_INPUTS = ("hidden", "words")
PAIRINGS = ("rank", "same")
DECODE_ROUTINGS = ("prefill", "step")
CFS_FORMS = ("weights", "table")
CFS_PRODUCTS = ("inner", "sums")
UNKNOWN_PROMPTS = ("warn", "error")
BIASES = ("none", "all", "mixlora_only")
WITH_ENCODER = ("SEQ_2_SEQ_LM",)
"""Task types of PEFT's whose decoders attend to an encoder's states, where words are not at hand."""
KINDS = {**OF_ANY_ADAPTER, "count_padding": TRUTH, "init_weights": TRUTH}
"""By name, of which kind fields are that have neither a list of values nor bounds of their own."""
OF_THE_END = r"(.*\.)?({})$"
"""How `rank_pattern` and `alpha_pattern` match, as LoRA's in PEFT: whole parts of a name, from its end."""
OF_THE_LAYERS = r".*\.{}\.(\d+)\."
"""How PEFT matches `layers_pattern`."""
FORMAT_VERSION = 2
"""Raised when an adapter can no longer be read correctly by the versions of this package before it.

1: pairing by rank, routers on hidden states of the prompt or the sequence, W_AB. 2: the further forms.
"""


@dataclass
class MixLoraConfig(PeftConfig):
    """Configuration of a [`MixLoraModel`] (Shen et al., ACL 2024, section 3).

    Every adapted linear layer owns `num_factors` rank-one factors in pool A and as many in pool B; for each instance
    the routers choose `r` of each, and the update is scaled by `lora_alpha / r`.

    Raises:
        ValueError: a field holds a value outside its documented set; the message names it.
    """

    r: int = field(default=4, metadata={"help": "Factors chosen per instance: the rank of one instance's update."})
    num_factors: int = field(default=16, metadata={"help": "Rank-one factors in each of the pools A and B (E)."})
    lora_alpha: float = field(default=32, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of pool A, in [0, 1)."})
    pairing: Literal["rank", "same"] | None = field(
        default=None,
        metadata={
            "help": "How chosen factors of the two pools meet. 'rank': two routers choose, and the j-th chosen A "
            "factor meets the j-th chosen B factor (the paper). 'same': one router chooses, and factor e of pool A "
            "meets factor e of pool B; fewer parameters, and pairs that last. Default: 'same', with routing='ifs_cfs', "
            "which needs two routers, 'rank'."
        },
    )
    routing: Literal["ifs_cfs", "ifs", "random"] | None = field(
        default=None,
        metadata={
            "help": "'ifs': both routers look at the instance (the authors' cond_type=input). 'ifs_cfs': router B also "
            "looks at the chosen A factors (the authors' input_lora_a_param). 'random': the control without routers; a "
            "fresh draw per instance in training, one fixed draw per layer in evaluation. Default: 'ifs', with "
            "pairing='rank' 'ifs_cfs'."
        },
    )
    router_gradient: Literal["straight_through", "none"] = field(
        default="straight_through",
        metadata={
            "help": "'straight_through' trains the routers; 'none' leaves them at their initial values, as the "
            "authors' released code does."
        },
    )
    router_init: Literal["uniform", "zero"] = field(
        default="uniform",
        metadata={
            "help": "How routers start. 'uniform': as LoRA's A, so routes differ from the first step. 'zero': every "
            "instance starts on the same route."
        },
    )
    router_scope: Literal["prompt", "sequence", "instruction"] | None = field(
        default=None,
        metadata={
            "help": "Positions that the routers average. 'prompt': attended positions before the supervised labels of "
            "an answer, for each answer of a conversation (without labels, every attended position). 'instruction': of "
            "those the text of the question that is answered, without image features and earlier turns. 'sequence': "
            "every attended position. Samples that are packed into one row are averaged apart. Default: 'instruction', "
            "with count_padding, which it has no use for, 'prompt'."
        },
    )
    router_input: Literal["hidden", "words"] | None = field(
        default=None,
        metadata={
            "help": "What routers average. 'hidden': each layer's own input (the paper). 'words': the text's input "
            "embeddings, centred by their mean over training, the same in every layer. Default: 'words'; 'hidden' "
            "with routing='random', decode_routing='step', count_padding or task_type='SEQ_2_SEQ_LM', which have none."
        },
    )
    count_padding: bool = field(
        default=False, metadata={"help": "Let padding take part in the routers' average, as the authors' code does."}
    )
    decode_routing: Literal["prefill", "step"] = field(
        default="prefill",
        metadata={
            "help": "'prefill' routes on the prompt and keeps the routes for every generated token; 'step' routes "
            "each forward pass on its own input, as the authors' code does."
        },
    )
    unknown_prompt: Literal["warn", "error"] = field(
        default="warn",
        metadata={
            "help": "What a training step does whose labels show no prompt, so that routers, unless they average the "
            "whole sequence, average what generation will not see: 'warn' says so once and averages every attended "
            "position; 'error' stops."
        },
    )
    cfs: Literal["weights", "table"] = field(
        default="weights",
        metadata={
            "help": "What CFS trains. 'weights': W_AB [r, E, d_in] (the paper). 'table': the r*E*E scores that are all "
            "of W_AB that routes depend on."
        },
    )
    cfs_temperature: float = field(
        default=1.0, metadata={"help": "CFS's scores are divided by it before each softmax; below 1 they decide more."}
    )
    cfs_product: Literal["inner", "sums"] = field(
        default="inner",
        metadata={
            "help": "How CFS scores a B factor for a chosen A factor: 'inner' is the paper's inner product; 'sums' is "
            "the product of the two vectors' sums, which is what the authors' code computes."
        },
    )
    balance_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a term that is added to the loss in training and favours routers which use all factors "
            "alike (Switch Transformers' load-balancing loss); 0 leaves it out."
        },
    )
    task_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "For data with task labels: in training each task's instances take a fixed subset of r factors, "
            "and minus the mean log probability that the router gives it joins the loss with this weight; at inference "
            "the router alone decides. 0 leaves it out."
        },
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Names of the tasks of task_loss_weight; their order tells their subsets."}
    )
    bias: Literal["none", "all", "mixlora_only"] = field(
        default="none", metadata={"help": "Biases to train: none, all, or those of the adapted layers."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (suffixes) of the linear layers to adapt, a regular expression, or 'all-linear', towers "
            "included. Default: every linear layer of the model's decoder, but the experts of mixtures; for models "
            "without a decoder what PEFT's LoRA would take."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) or a regular expression of layers not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers to adapt; all of them when unset."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform indexes, such as 'layers'."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "r for layers whose name matches a key (a suffix or regex)."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "lora_alpha for layers whose name matches a key (a suffix or regex)."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save with the adapter."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start with pool B at zero (no effect). False draws pool B at random; meant for tests."},
    )
    format_version: int | None = field(
        default=None,
        metadata={
            "help": "Version of the saved adapter's format, the lowest that can express it; an adapter of a later one "
            "than is known is refused."
        },
    )

    training_record: ClassVar[TrainingRecord | None] = None
    """What the model card shall tell of the training; assigned to an instance, and no part of `adapter_config.json`."""

    def __post_init__(self) -> None:
        check_kinds(vars(self), {"task_type": TASK_TYPE})
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._choose_form(stored=self.peft_type is not None)
        self.peft_type = MIXLORA
        self._check_format()
        check_kinds(vars(self), KINDS)
        self._check_values()
        self.format_version = max(self.format_version or 1, 2 if self._has_further_forms() else 1)
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)

    @classmethod
    def paper(cls, **overrides: Any) -> MixLoraConfig:
        """The released behaviour of the authors' code: frozen routers that average every position of every forward.

        `overrides` are further fields, or other values for those that this preset sets.
        """
        released = {
            "pairing": "rank",
            "router_gradient": "none",
            "router_scope": "sequence",
            "router_input": "hidden",
            "count_padding": True,
            "decode_routing": "step",
            "cfs_product": "sums",
        }
        return cls(**{**released, **overrides})

    @classmethod
    def paper_formulas(cls, **overrides: Any) -> MixLoraConfig:
        """What the paper writes (section 3) where its code differs: trained routers, CFS by inner products.

        Routers average the whole sequence; in training that holds the answer, so routes are not those of inference.
        `overrides` as in [`paper`](MixLoraConfig.paper).
        """
        written = {
            "pairing": "rank",
            "routing": "ifs_cfs",
            "router_gradient": "straight_through",
            "router_scope": "sequence",
            "router_input": "hidden",
            "cfs": "weights",
            "cfs_product": "inner",
        }
        return cls(**{**written, **overrides})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `adapter_config.json` and, beside an adapter that `PeftModel.save_pretrained` has saved, its card."""
        super().save_pretrained(str(save_directory), **kwargs)
        weights = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file() and not weights.is_symlink():
            follow_umask(weights)  # safetensors makes it for its owner alone
        write_card(self, save_directory, self.training_record)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The fields in an `adapter_config.json`, as PEFT reads them (`PeftConfigMixin.from_json_file`).

        Raises:
            MixLoraError: it is no JSON file of bounded size and depth, with each key once and numbers that are ones.
        """
        fields = read_json(Path(path_json_file))
        fields.pop("runtime_config", None)
        return fields

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The configuration in a folder or of a name on the hub (`PeftConfigMixin.from_pretrained`).

        It is what PEFT makes an adapter's layers from. Where the adapter's weights lie in that folder, they have to
        fit it: of layers as large as it says there might be no memory.

        Raises:
            MixLoraError: the configuration is damaged, or the weights beside it are of another adapter.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        check_beside(config, Path(pretrained_model_name_or_path, subfolder or ""))
        return config

    def rank_of(self, layer: str) -> int:
        """r in the layer of this name: that of the first key of `rank_pattern` that matches it, or else `r`."""
        return _first_match(self.rank_pattern, layer, self.r)

    def alpha_of(self, layer: str) -> float:
        """lora_alpha in the layer of this name, as [`rank_of`](MixLoraConfig.rank_of)."""
        return _first_match(self.alpha_pattern, layer, self.lora_alpha)

    def _choose_form(self, stored: bool) -> None:
        """Fill in what is left open.

        `stored`: the fields are those of a saved adapter, whose file names the peft_type. What it does not name did not
        exist when it was written, and everything was as in the paper.
        """
        if self.pairing is None:
            of_cfs = (self.cfs, self.cfs_temperature, self.cfs_product) != ("weights", 1, "inner")
            by_cfs = self.routing == "ifs_cfs" or (self.routing is None and of_cfs)
            self.pairing = "rank" if stored or by_cfs else "same"
        if self.routing is None:
            self.routing = "ifs_cfs" if self.pairing == "rank" else "ifs"
        if self.router_scope is None:
            self.router_scope = "prompt" if stored or self.count_padding else "instruction"
        if self.router_input is None:
            of_steps = self.decode_routing == "step"  # whose own words are those of one token
            has_no_words = self.routing == "random" or self.count_padding or self.task_type in WITH_ENCODER
            self.router_input = "hidden" if stored or of_steps or has_no_words else "words"

    def _check_format(self) -> None:
        known = self.format_version is None or isinstance(self.format_version, int)
        if not known or (self.format_version or 1) > FORMAT_VERSION:
            raise MixLoraError(
                f"format_version={self.format_version!r}: saved by a newer llava-mixlora; llava-mixlora "
                f"{version('llava-mixlora')}, installed here, reads formats up to {FORMAT_VERSION}; upgrade it"
            )

    def _check_values(self) -> None:
        for name in ("num_factors", "r"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise MixLoraError(f"{name}={value!r}: expected a whole number of at least 1")
        if self.num_factors > (most := limits().num_factors):
            how = how_to_raise("num_factors")
            raise MixLoraError(f"num_factors={self.num_factors}: expected {most} at most; lower num_factors {how}")
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if not 1 <= rank <= self.num_factors:
                raise MixLoraError(
                    f"{name}={rank}: expected 1 to num_factors={self.num_factors}, since r factors are chosen out of "
                    "num_factors; lower the rank or raise num_factors"
                )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise MixLoraError(f"lora_dropout={self.lora_dropout!r}: expected a number in [0, 1)")
        choices = {
            "pairing": PAIRINGS,
            "routing": ROUTINGS,
            "router_gradient": ROUTER_GRADIENTS,
            "router_init": ROUTER_INITS,
            "router_scope": ROUTER_SCOPES,
            "router_input": ROUTER_INPUTS,
            "decode_routing": DECODE_ROUTINGS,
            "cfs": CFS_FORMS,
            "cfs_product": CFS_PRODUCTS,
            "unknown_prompt": UNKNOWN_PROMPTS,
            "bias": BIASES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise MixLoraError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, known))}")
        self._check_router_losses()
        self._check_tasks(ranks)
        self._check_forms()
        self._check_patterns()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise MixLoraError(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules as a list of names, but "
                f"target_modules={self.target_modules!r} is a string; put the layer indices into the expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise MixLoraError(
                f"layers_pattern={self.layers_pattern!r} has no meaning without layers_to_transform; set both or none"
            )

    def _check_patterns(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                check_pattern(name, pattern)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                check_pattern(f"{name}[{key!r:.80}]", key, OF_THE_END)
        of_layers = self.layers_pattern or ()
        for pattern in (of_layers,) if isinstance(of_layers, str) else of_layers:
            check_pattern("layers_pattern", pattern, OF_THE_LAYERS)

    def _has_further_forms(self) -> bool:
        """Whether the adapter does what format 1 has no words for."""
        return (
            self.pairing != "rank"
            or self.router_scope == "instruction"
            or self.router_input != "hidden"
            or self.cfs != "weights"
            or self.cfs_temperature != 1
        )

    def _check_router_losses(self) -> None:
        for name in ("balance_loss_weight", "task_loss_weight"):
            weight = getattr(self, name)
            if not is_number(weight) or weight < 0:
                raise MixLoraError(f"{name}={weight!r}: expected a number of at least 0")
            if weight > 0 and (self.router_gradient == "none" or self.routing == "random"):
                what = "router_gradient='none'" if self.router_gradient == "none" else "routing='random'"
                raise MixLoraError(
                    f"{name}={weight!r} trains the routers, but {what} leaves none to train; set it to 0 or choose "
                    "another"
                )

    def _check_tasks(self, ranks: dict[str, int]) -> None:
        weight, tasks = self.task_loss_weight, self.tasks
        if tasks is not None and (
            not isinstance(tasks, (list, tuple))
            or not all(isinstance(task, str) and task for task in tasks)
            or len(set(tasks)) != len(tasks)
        ):
            raise MixLoraError(f"tasks={repr(tasks)[:200]}: expected a list of different names")
        if len(tasks or ()) > (most := limits().tasks):
            raise MixLoraError(f"tasks: {len(tasks):,} of them; expected {most:,} at most {how_to_raise('tasks')}")
        if weight == 0:
            return
        if not tasks:
            raise MixLoraError(
                f"task_loss_weight={weight!r} needs to know the tasks; name those of the data, tasks=['vqa', ...], or "
                "set it to 0"
            )
        if self.routing == "ifs_cfs":
            raise MixLoraError(
                f"task_loss_weight={weight!r}: with routing='ifs_cfs' what chooses B factors is no probability that "
                "could learn a task's; use routing='ifs', or pairing='same'"
            )
        for name, rank in ranks.items():
            if (subsets := math.comb(self.num_factors, rank)) < len(tasks):
                raise MixLoraError(
                    f"tasks: {len(tasks)} of them, but {name}={rank} of num_factors={self.num_factors} makes only "
                    f"{subsets} different subsets; raise num_factors, or set task_loss_weight=0"
                )

    def _check_forms(self) -> None:
        """Refuse forms that contradict each other."""
        temperature = self.cfs_temperature
        if not is_number(temperature) or temperature <= 0:
            raise MixLoraError(f"cfs_temperature={temperature!r}: expected a number above 0")
        if self.pairing == "same" and self.routing == "ifs_cfs":
            raise MixLoraError(
                "routing='ifs_cfs' chooses B factors by the A factors, but pairing='same' chooses both at once; use "
                "routing='ifs', or pairing='rank'"
            )
        if self.routing != "ifs_cfs" and (self.cfs != "weights" or temperature != 1):
            what = f"cfs={self.cfs!r}" if self.cfs != "weights" else f"cfs_temperature={temperature!r}"
            raise MixLoraError(f"{what} has no meaning with routing={self.routing!r}; use routing='ifs_cfs'")
        if self.cfs == "table" and self.cfs_product != "inner":
            raise MixLoraError(
                f"cfs_product={self.cfs_product!r} makes the table of CFS from W_AB, but cfs='table' trains the table "
                "itself; leave one of them out"
            )
        if self.count_padding and (self.router_scope == "instruction" or self.router_input == "words"):
            what = "router_scope='instruction'" if self.router_scope == "instruction" else "router_input='words'"
            raise MixLoraError(f"count_padding=True averages padding, and {what} text alone; leave one of them out")
        if self.router_input == "words" and self.routing == "random":
            raise MixLoraError("router_input='words' has no meaning with routing='random', which has no routers")


def _first_match(patterns: dict[str, Any], layer: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(OF_THE_END.format(key), layer)), default)
