"""What evaluation counts: matches, POPE's figures, MME's scores. Pure functions on strings; shares are from 0 to 1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .questions import MME_COGNITION, MME_PERCEPTION


def normalised(text: str) -> str:
    """Lower case, without surrounding blanks and the dot at the end."""
    return text.strip().lower().removesuffix(".").rstrip()


def exact_match(answer: str, target: str) -> bool:
    """Whether an answer is its target, up to case, blanks around it and a dot at its end."""
    return normalised(answer) == normalised(target)


def contained_match(answer: str, target: str) -> bool:
    """Whether an answer contains its target as whole words, up to case."""
    words, wanted = (_words(normalised(text)) for text in (answer, target))
    return bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(words)} "


def says_yes(answer: str) -> bool:
    """Yes or no by POPE's rule, as upstream's `llava.eval.eval_pope`: no if its first sentence has No, no or not."""
    first_sentence = answer.partition(".")[0].replace(",", "")
    return not {"No", "no", "not"} & set(first_sentence.split(" "))


@dataclass(frozen=True)
class Pope:
    """POPE (Li et al., 2023), "yes" being the positive class; precision, recall, F1 are 0 where nothing is counted."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_share: float


def pope(answers: Sequence[str], targets: Sequence[str]) -> Pope:
    """POPE's figures; a target is yes or no."""
    said = [says_yes(answer) for answer in answers]
    wanted = [normalised(target) == "yes" for target in targets]
    pairs = list(zip(said, wanted))
    both, right = sum(s and w for s, w in pairs), sum(s == w for s, w in pairs)
    precision, recall = _share(both, sum(said)), _share(both, sum(wanted))
    f1 = _share(2 * precision * recall, precision + recall)
    return Pope(_share(right, len(pairs)), precision, recall, f1, _share(sum(said), len(pairs)))


@dataclass(frozen=True)
class Mme:
    """MME (Fu et al., 2023): by subtask accuracy and accuracy+ in percent; totals of the sums of both."""

    accuracy: dict[str, float]
    accuracy_plus: dict[str, float]
    perception: float
    cognition: float


def mme(subtasks: Sequence[str], images: Sequence[str], answers: Sequence[str], targets: Sequence[str]) -> Mme:
    """MME's scores. Accuracy+ counts an image only if all of its questions (two, in MME) are answered rightly."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for subtask, image, answer, target in zip(subtasks, images, answers, targets):
        right[subtask][image].append(_mme_answer(answer) == normalised(target))
    accuracy, plus = {}, {}
    for subtask, by_image in right.items():
        hits = [hit for of_image in by_image.values() for hit in of_image]
        accuracy[subtask] = 100 * _share(sum(hits), len(hits))
        plus[subtask] = 100 * _share(sum(map(all, by_image.values())), len(by_image))

    def total(group: Sequence[str]) -> float:
        return sum(accuracy[subtask] + plus[subtask] for subtask in group if subtask in accuracy)

    return Mme(accuracy, plus, total(MME_PERCEPTION), total(MME_COGNITION))


def _mme_answer(answer: str) -> str:
    """MME's own rule: the answer itself, or what its first four letters hold; else it is neither."""
    answer = normalised(answer)
    if answer in ("yes", "no"):
        return answer
    start = answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text).split()


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
