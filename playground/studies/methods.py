"""The methods that the study compares: what each trains, and what it is told of the tasks.

Every method is a function from a [`Course`] (base, data, steps, learning rate, seed) to a [`Learner`], a model that can
be asked. `METHODS` names them all; a row of the study's tables is one of them.

MixLoRA, with E = 16 factors in each pool, is told nothing of the tasks unless its row says so:

- `paper`: routers average the prompt, pair the j-th A factor with the j-th B factor, and CFS conditions B on A. Rows
  that add to this name change one thing: no CFS, CFS as a trained table, or routers that start at zero.
- `instruction`: one router for both pools, on the text of the instruction.
- `words`: the same on the instruction's word vectors.
- `words, frozen`: routers stay as they start.
- `words, task labels`: training is told each instance's task, and routers learn to name its factors; asking is not.

Controls are the bounds of what routes can do: `random routes`, and `oracle routes`, in which each task has the fixed
factors that task labels would give it, also when it is asked. MixLoRA takes no labels at inference, so the oracle is a
LoRA of rank E with a mask for each task. `one LoRA per task` is the same with factors that no other task shares: the
LoRAs are trained in one model, and no gradient of one task reaches another's.

PEFT's own mixtures, on adapters of rank 4:

- `Poly` learns a soft choice of four LoRAs (as many factors as MixLoRA's) for each task. It has to be told the task of
  every instance, asked ones included, so it can be asked nothing about a task that it was not trained on.
- `X-LoRA` mixes trained adapters by the hidden states of a first pass without them. As with its authors, the adapters,
  one for each task, are trained first, in half of the steps; then they stay, and the rest trains the mixture. It counts
  scalings by the token ids that it is given, and so fails where LLaVA puts image features among them; here it is given
  the sequence as vectors. A step of it costs two or three.
- `Arrow` mixes the same adapters, trained in all of the steps, by their largest singular vectors, and learns no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PolyConfig, XLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from llava_mixlora import MixLoraConfig
from llava_mixlora.inference.samples import Batch, with_images
from llava_mixlora.method.model import ADAPTER, LLAMA_LINEAR_LAYERS
from llava_mixlora.method.task_subsets import task_subsets
from playground.studies.short_training import Inputs, Items, TinyLlava, train, without_tasks

FACTORS = 16
RANK = 4  # of MixLoRA's update for one instance, and of every adapter that is mixed
SCALING = 2  # lora_alpha over rank in a LoRA; MixLoRA's lora_alpha is twice its factors, the authors' ratio
TASK_LOSS_WEIGHT = 1.0


@dataclass(frozen=True)
class Course:
    """What a method is to learn, and how.

    Args:
        llava: the base model.
        items: what is trained on; its tasks are all that there are.
        steps: the numbers of the samples of each step.
        learning_rate: the highest of the schedule.
        seed: of initial weights.
        layers: indices of the decoder layers to adapt; all when None.
        watch: is called after each step with the learner and the step's number.
    """

    llava: TinyLlava
    items: Items
    steps: Sequence[Sequence[int]]
    learning_rate: float
    seed: int
    layers: tuple[int, ...] | None = None
    watch: Callable[[Learner, int], None] | None = None

    def places(self) -> dict[str, Any]:
        """Which layers to adapt, as fields of a PEFT configuration."""
        layers = None if self.layers is None else list(self.layers)
        return {"target_modules": list(LLAMA_LINEAR_LAYERS), "layers_to_transform": layers}

    def adapted(self, config: PeftConfig) -> PeftModel:
        """A fresh adapter on a fresh base."""
        return self.llava.adapted(config, self.seed)

    def train(self, learner: Learner) -> Learner:
        """Take all steps; returns the learner."""
        watch = None if self.watch is None else partial(self.watch, learner)
        train(learner.model, self.items, self.steps, self.learning_rate, learner.inputs, watch)
        return learner


@dataclass(frozen=True)
class Learner:
    """A model, and what it is given of a batch and of its instances' tasks, in training and when it is asked."""

    model: PeftModel
    inputs: Inputs = without_tasks

    def trained_parameters(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Learnt:
    """A learner at the end of its course, and how many numbers were trained on the way."""

    learner: Learner
    trained_parameters: int


@dataclass(frozen=True)
class Method:
    """A row of the study's tables.

    Args:
        row: its name, without the rank.
        r: the rank of the update that one instance gets.
        learn: goes through a course.
        asks_with_tasks: whether it is told the task of what it is asked, as no user would tell it.
    """

    row: str
    r: int
    learn: Callable[[Course], Learnt]
    asks_with_tasks: bool = False

    @property
    def name(self) -> str:
        """Row and rank."""
        return f"{self.row}, r={self.r}"


def _adapter(config: Callable[[Course], PeftConfig], inputs: Inputs = without_tasks) -> Callable[[Course], Learnt]:
    """Trains the adapter of a configuration."""

    def learn(course: Course) -> Learnt:
        learner = Learner(course.adapted(config(course)), inputs)
        return Learnt(course.train(learner), learner.trained_parameters())

    return learn


def _lora(r: int) -> Method:
    def config(course: Course) -> PeftConfig:
        return LoraConfig(r=r, lora_alpha=SCALING * r, **course.places())

    return Method("LoRA", r, _adapter(config))


# --- MixLoRA --------------------------------------------------------------------------------------------------------

PAPER = {"pairing": "rank", "routing": "ifs_cfs", "router_scope": "prompt", "router_input": "hidden"}
INSTRUCTION = {"pairing": "same", "router_scope": "instruction", "router_input": "hidden"}
IN_WORDS = {**INSTRUCTION, "router_input": "words"}


def _mixlora(row: str, form: dict[str, Any]) -> Method:
    return Method(f"MixLoRA {row}", RANK, _adapter(lambda course: _mixlora_config(course, form)))


def _mixlora_with_labels() -> Method:
    def config(course: Course) -> PeftConfig:
        labels = {"task_loss_weight": TASK_LOSS_WEIGHT, "tasks": list(course.items.tasks)}
        return _mixlora_config(course, {**IN_WORDS, **labels})

    return Method("MixLoRA words, task labels", RANK, _adapter(config, _labels_in_training))


def _mixlora_config(course: Course, form: dict[str, Any]) -> MixLoraConfig:
    return MixLoraConfig(r=RANK, num_factors=FACTORS, lora_alpha=SCALING * FACTORS, **form, **course.places())


def _labels_in_training(model: PeftModel, batch: Batch, tasks: Tensor) -> Batch:
    return {**batch, "mixlora_tasks": tasks} if model.training else batch


# --- each task its own factors --------------------------------------------------------------------------------------


class FactorsOfTasks:
    """Lets every instance use only its task's factors of a LoRA; the model's inputs, as [`Inputs`].

    `allowed`: bool [tasks, rank].
    """

    def __init__(self, model: PeftModel, allowed: Tensor) -> None:
        self._allowed = allowed
        self._now: Tensor | None = None  # of the instances of the forward pass, [B, rank]
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_A[ADAPTER].register_forward_hook(self._keep)

    def __call__(self, model: PeftModel, batch: Batch, tasks: Tensor) -> Batch:
        self._now = self._allowed[tasks]
        return batch

    def _keep(self, module: torch.nn.Module, args: tuple[Tensor, ...], z: Tensor) -> Tensor:
        return z * self._now.unsqueeze(1)


def _oracle() -> Method:
    def learn(course: Course) -> Learnt:
        subsets = task_subsets(len(course.items.tasks), FACTORS, RANK)
        allowed = torch.zeros(len(subsets), FACTORS, dtype=torch.bool).scatter(1, subsets, True)
        learner = _masked(course, allowed, SCALING * FACTORS / RANK)
        return Learnt(course.train(learner), learner.trained_parameters())

    return Method("oracle routes", RANK, learn, asks_with_tasks=True)


def _one_per_task(course: Course) -> Learner:
    tasks = len(course.items.tasks)
    return _masked(course, torch.eye(tasks, dtype=torch.bool).repeat_interleave(RANK, dim=1), SCALING)


def _masked(course: Course, allowed: Tensor, scaling: float) -> Learner:
    rank = allowed.shape[1]
    model = course.adapted(LoraConfig(r=rank, lora_alpha=scaling * rank, **course.places()))
    return Learner(model, FactorsOfTasks(model, allowed))


def _learn_one_per_task(course: Course) -> Learnt:
    learner = _one_per_task(course)
    return Learnt(course.train(learner), learner.trained_parameters())


# --- PEFT's own mixtures --------------------------------------------------------------------------------------------

FOR_TASK_IDS = "CAUSAL_LM"  # the one kind of PeftModel here that passes `task_ids` on to Poly


def _poly() -> Method:
    def config(course: Course) -> PeftConfig:
        places = course.places()
        if places.pop("layers_to_transform") is not None:  # which Poly has not
            places["target_modules"] = _expression(course.layers)
        tasks = len(course.items.tasks)
        return PolyConfig(r=RANK, n_skills=FACTORS // RANK, n_tasks=tasks, task_type=FOR_TASK_IDS, **places)

    def inputs(model: PeftModel, batch: Batch, tasks: Tensor) -> Batch:
        return {**batch, "task_ids": tasks}

    return Method("Poly", RANK, _adapter(config, inputs), asks_with_tasks=True)


def _expression(layers: Sequence[int]) -> str:
    return rf".*\.layers\.({'|'.join(map(str, layers))})\..*\.({'|'.join(LLAMA_LINEAR_LAYERS)})"


def _learn_xlora(course: Course) -> Learnt:
    half = len(course.steps) // 2
    experts = replace(course, steps=course.steps[:half], watch=None)
    rest = replace(course, steps=course.steps[half:])
    with _saved_experts(experts) as (folders, parameters):
        base = course.llava.fresh()
        base.config.use_cache = False  # which X-LoRA insists on
        adapters = {str(number): str(folder) for number, folder in enumerate(folders)}
        torch.manual_seed(course.seed)
        model = get_peft_model(base, XLoraConfig(hidden_size=base.config.hidden_size, adapters=adapters))
    learner = Learner(model, _as_vectors)
    parameters += learner.trained_parameters()
    return Learnt(rest.train(learner), parameters)


def _as_vectors(model: PeftModel, batch: Batch, tasks: Tensor) -> Batch:
    return with_images(model, batch)


def _learn_arrow(course: Course) -> Learnt:
    from peft import ArrowConfig  # PEFT 0.18 and later

    with _saved_experts(replace(course, watch=None)) as (folders, parameters):
        # As peft.create_arrow_model does, which would route in all layers, and fail in those without adapters.
        names = [f"task_{number}" for number in range(len(folders))]
        model = PeftModel.from_pretrained(course.llava.fresh(), folders[0], adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:]):
            model.load_adapter(folder, name)
        arrow = ArrowConfig()
        arrow.task_adapter_names, arrow.gks_adapter_names = names, []
        model.add_adapter("arrow_router", LoraConfig(r=RANK, arrow_config=arrow, **course.places()))
        model.set_adapter("arrow_router")
    return Learnt(Learner(model), parameters)


@contextmanager
def _saved_experts(course: Course) -> Iterator[tuple[list[Path], int]]:
    """Folders of one trained LoRA for each task, as long as the context lasts, and how many numbers they are."""
    learner = _one_per_task(course)
    course.train(learner)
    together = dict(learner.model.named_parameters())
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(number) for number in range(len(course.items.tasks))]
        expert = course.adapted(LoraConfig(r=RANK, lora_alpha=SCALING * RANK, **course.places()))
        for number, folder in enumerate(folders):
            mine = slice(RANK * number, RANK * (number + 1))
            for name, parameter in expert.named_parameters():
                if parameter.requires_grad:
                    parameter.data = together[name].data[(mine,) if ".lora_A." in name else (slice(None), mine)].clone()
            expert.save_pretrained(folder)
        yield folders, learner.trained_parameters()


LORA_RANKS = (2, 4, 16, 32)
ONE_PER_TASK = Method("one LoRA per task", RANK, _learn_one_per_task, asks_with_tasks=True)
_ALL = (
    ONE_PER_TASK,
    *map(_lora, LORA_RANKS),
    _poly(),
    Method("X-LoRA", RANK, _learn_xlora),
    Method("Arrow", RANK, _learn_arrow),
    _mixlora("paper", PAPER),
    _mixlora("paper, no CFS", {**PAPER, "routing": "ifs"}),
    _mixlora("paper, CFS table", {**PAPER, "cfs": "table"}),
    _mixlora("paper, from zero", {**PAPER, "router_init": "zero"}),
    _mixlora("instruction", INSTRUCTION),
    _mixlora("words", IN_WORDS),
    _mixlora("words, frozen", {**IN_WORDS, "router_gradient": "none"}),
    _mixlora_with_labels(),
    _mixlora("random routes", {"pairing": "same", "routing": "random"}),
    _oracle(),
)
METHODS = {method.name: method for method in _ALL}
"""By name, in the order of the tables."""
