"""The study's first part: eleven of the playground's tasks at once, and the twelfth as the zero-shot test.

These tasks hardly cost each other accuracy. What this part asks is how much a mixture loses or wins where there is
little to win, and what the pieces of the paper's method add. All layers of the decoder are adapted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_mixlora.data.conversations import read_conversations
from playground.data.main_job import HELDOUT as HELDOUT_FILE
from playground.data.main_job import TRAIN as TRAIN_FILE
from playground.data.main_job import first_of_each_task
from playground.studies.comparison import HELDOUT, TRAIN, VALIDATION, Cell, Setting
from playground.studies.methods import METHODS
from playground.studies.short_training import Sample

ZERO_SHOT_TASK = "digit"
ZERO_SHOT = "zero-shot"
VALIDATION_SHARE = 10  # one training picture in so many is asked about for the learning rates only


@dataclass(frozen=True)
class ElevenTasks(Setting):
    """Eleven tasks of `playground.data.tasks`."""

    def samples(self, data: Path) -> dict[str, list[Sample]]:
        """As [`Setting.samples`], with `ZERO_SHOT`: held-out questions of the twelfth task."""
        known = [sample for sample in read_conversations(data / TRAIN_FILE) if sample["task"] != ZERO_SHOT_TASK]
        set_aside = set(sorted({sample["image"] for sample in known})[::VALIDATION_SHARE])
        unseen = [sample for sample in known if sample["image"] in set_aside]
        test = first_of_each_task(read_conversations(data / HELDOUT_FILE), self.questions)
        return {
            TRAIN: [sample for sample in known if sample["image"] not in set_aside],
            VALIDATION: first_of_each_task(unseen, self.validation_questions),
            HELDOUT: [sample for sample in test if sample["task"] != ZERO_SHOT_TASK],
            ZERO_SHOT: [sample for sample in test if sample["task"] == ZERO_SHOT_TASK],
        }


ELEVEN_TASKS = ElevenTasks("eleven tasks", steps=240, batch_size=8, validation_questions=30, questions=100)
OF_THE_OTHER_PART = (
    *("X-LoRA, r=4", "Arrow, r=4", "oracle routes, r=4"),
    *("MixLoRA words, frozen, r=4", "MixLoRA words, task labels, r=4"),
)
"""Methods whose point is to tell tasks apart, which the code books ask for and these tasks do not."""
IN_SHORT = ("one LoRA per task, r=4", "LoRA, r=4", "MixLoRA paper, r=4", "MixLoRA instruction, r=4")


def cells(short: bool) -> list[Cell]:
    """Every method but those of the other part, or the few of the short form."""
    methods = IN_SHORT if short else [method for method in METHODS if method not in OF_THE_OTHER_PART]
    return [Cell(ELEVEN_TASKS, method, ELEVEN_TASKS.steps) for method in methods]
