"""The study's second part: code books, tasks that contradict each other about the same pictures.

Eight and 32 of them (`playground.data.code_books`), asked in one wording or in several. With several, six wordings are
trained, and three further ones only asked. The decoder's upper half is adapted: there the lower layers have read the
instruction, and one adapter for all tasks is hard pressed. Rates are chosen with eight books; 32 take the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from playground.data.code_books import NEW_WORDINGS, WORDINGS, code_books, digit_pictures, questions
from playground.studies.comparison import HELDOUT, TRAIN, VALIDATION, Cell, Setting
from playground.studies.methods import LORA_RANKS, ONE_PER_TASK
from playground.studies.short_training import Sample

NEW = "new wordings"
VALIDATION_SHARE = 10  # one training picture in so many is asked about for the learning rates only
UPPER_LAYERS = (2, 3)


@dataclass(frozen=True)
class CodeBooks(Setting):
    """`books` code books in the first `wordings` wordings."""

    books: int = 8
    wordings: int = 1

    def samples(self, data: Path) -> dict[str, list[Sample]]:
        """As [`Setting.samples`], with the held-out questions in `NEW` wordings where several are trained."""
        books, wordings = code_books(self.books), WORDINGS[: self.wordings]
        pictures, unseen = digit_pictures(data, "train"), digit_pictures(data, "heldout")
        set_aside = pictures[::VALIDATION_SHARE]
        learnt = [picture for number, picture in enumerate(pictures) if number % VALIDATION_SHARE]
        found = {
            TRAIN: questions(learnt, books, wordings),
            VALIDATION: questions(set_aside, books, wordings, self.validation_questions),
            HELDOUT: questions(unseen, books, wordings, self.questions),
        }
        if self.wordings > 1:
            found[NEW] = questions(unseen, books, NEW_WORDINGS, self.questions)
        return found


_COMMON = {"steps": 300, "batch_size": 16, "layers": UPPER_LAYERS}
_EIGHT = {**_COMMON, "validation_questions": 30, "questions": 50, "books": 8}
_MANY = {**_COMMON, "validation_questions": 10, "questions": 20, "books": 32}
FIXED_8 = CodeBooks("8 code books, fixed wording", **_EIGHT)
PARAPHRASED_8 = CodeBooks("8 code books, paraphrased", **_EIGHT, wordings=len(WORDINGS))
FIXED_32 = CodeBooks("32 code books, fixed wording", **_MANY, tuned_in=FIXED_8)
PARAPHRASED_32 = CodeBooks("32 code books, paraphrased", **_MANY, wordings=len(WORDINGS), tuned_in=PARAPHRASED_8)

LONG, LONGEST = 1500, 3000
AT_FIRST = {
    FIXED_8: (
        *(ONE_PER_TASK.name, *(f"LoRA, r={r}" for r in LORA_RANKS), "Poly, r=4", "X-LoRA, r=4", "Arrow, r=4"),
        *("MixLoRA paper, r=4", "MixLoRA instruction, r=4", "MixLoRA words, r=4", "MixLoRA words, frozen, r=4"),
        *("MixLoRA words, task labels, r=4", "MixLoRA random routes, r=4", "oracle routes, r=4"),
    ),
    PARAPHRASED_8: (
        *(ONE_PER_TASK.name, "LoRA, r=16", "LoRA, r=32", "Poly, r=4"),
        *("MixLoRA paper, r=4", "MixLoRA instruction, r=4", "MixLoRA words, r=4"),
        *("MixLoRA words, task labels, r=4", "oracle routes, r=4"),
    ),
    FIXED_32: (ONE_PER_TASK.name, "LoRA, r=32", "MixLoRA paper, r=4", "MixLoRA words, r=4", "oracle routes, r=4"),
    PARAPHRASED_32: (ONE_PER_TASK.name, "LoRA, r=32", "MixLoRA words, task labels, r=4", "oracle routes, r=4"),
}
AFTER_LONG = {
    FIXED_8: ("LoRA, r=16", "MixLoRA paper, r=4", "MixLoRA words, r=4"),
    PARAPHRASED_8: ("LoRA, r=16", "MixLoRA words, task labels, r=4"),
}
AFTER_LONGEST = {FIXED_8: ("LoRA, r=16",)}
IN_SHORT = {
    FIXED_8: (
        *(ONE_PER_TASK.name, "LoRA, r=32"),
        *("MixLoRA paper, r=4", "MixLoRA instruction, r=4", "MixLoRA words, r=4"),
    ),
    PARAPHRASED_8: ("LoRA, r=32", "MixLoRA words, r=4", "MixLoRA words, task labels, r=4"),
}


def cells(short: bool) -> list[Cell]:
    """Every cell, or those of the short form."""
    if short:
        return [Cell(setting, method, setting.steps) for setting, methods in IN_SHORT.items() for method in methods]
    found = []
    for setting, methods in AT_FIRST.items():
        found += [Cell(setting, method, setting.steps) for method in methods]
        found += [Cell(setting, method, LONG) for method in AFTER_LONG.get(setting, ())]
        found += [Cell(setting, method, LONGEST) for method in AFTER_LONGEST.get(setting, ())]
    return found
