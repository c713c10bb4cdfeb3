"""What figures about a data set's tasks advise in words: whether to route, and by what.

Two questions are asked one after the other. Do the tasks interfere: does a step on the other tasks harm a task, beyond
the noise of its batches? And could a router know better: do the instruction's words, or the picture, tell the tasks?
Each may be left open, and then the advice says what would answer it. Gradients show a conflict at one moment; what it
costs in accuracy only training shows, so every advice ends in a comparison with a plain LoRA.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .interference_estimate import Estimate
from .separability import Separability, Told

LOSS = 0.5
"""Of a task's own gain: what the other tasks' steps must take away. At the joint optimum of tasks that exclude each
other it is 1; with half of it, a task still learns, at half its pace."""
CLEAR = 2.0
"""In standard errors: how far the mean over the tasks must be from a bound, about 95% to either side."""
CLEAR_OF_MANY = 3.0
"""The same for the worst of many tasks: by 2, one of 40 unharmed ones would be taken for harmed."""
ALIKE = 0.75
"""The mean gain from another task's step, from which tasks count as one: halves of one task have 1, and a step on all
of them then gives each three quarters of what its own gives."""
HARMED_TASKS = 0.25
"""The share of the tasks from which harm to single ones counts as the mixture's. Of the playground's twelve tasks, one
was harmed at an early checkpoint, and one LoRA for all still came within two points of one for each."""
ENOUGH_TASKS = 0.5
"""The share of the tasks that must be measurable: what holds for fewer says little about a mixture of all."""
TELLING = 0.5
"""Of the way from guessing to certainty: below, routes would mix up again most of what they are to keep apart."""
ONE_ROUTE = 0.8
"""Cosine of two instructions of a task: from here on random routers give them 2.6 or more of r=4 factors of E=16 in
common (1 by chance, 4 for one wording), so a task finds its factors without labels."""

ROUTED = "--mixlora_enable True --mixlora_pairing same --mixlora_router_scope"
PLAIN = "--lora_enable True"
BY_INSTRUCTION = f"{ROUTED} instruction"
BY_WORDS = f"{BY_INSTRUCTION} --mixlora_router_input words"
BY_LABELS = f"{BY_WORDS} --mixlora_task_loss_weight 1"
BY_PICTURE = f"{ROUTED} prompt"
COMPARE = (
    f"Train a plain LoRA ({PLAIN}) as long beside it: gradients show a conflict at this moment of training, not what "
    "it costs in the end."
)
ENOUGH = (
    f"There is nothing for routes to keep apart, so a plain LoRA ({PLAIN}) is enough. What tasks disagree about can "
    "show later, once they have learnt what they share: to be sure, measure a later checkpoint too."
)
FIRST_PLAIN = (
    f"Start with a plain LoRA ({PLAIN}), and measure a later checkpoint too, since conflicts show once the tasks have "
    "learnt what they share. Consider routes where that LoRA stays behind one for each task."
)
MORE_DATA = (
    "That is not enough data to tell whether routing would help: ask for more --samples and a larger --batch-size, or "
    "measure a checkpoint from the middle of training."
)
WIDTH = 120
HEADLINES = {
    "interfere": "These tasks interfere",
    "alike": "These tasks do not interfere, they are as alike as parts of one task",
    "apart": "On the whole these tasks do not harm each other at this moment, but differ",
    "unclear": "Whether these tasks interfere cannot be told",
}


@dataclass(frozen=True)
class Recommendation:
    """Advice on one data set.

    Args:
        verdict: `"interfere"`, `"alike"` (as halves of one task), `"apart"` (neither), or `"unclear"`.
        option: flags of training that are advised; None where the data do not tell.
        text: the advice in sentences, with the figures that it rests on.
        figures: these and others, by name; see [`recommend`].
    """

    verdict: str
    option: str | None
    text: str
    figures: dict[str, Any]

    def headline(self, width: int) -> str:
        """The verdict and the option in lines of `width` letters, for the title of a picture."""
        return "\n".join(
            _wrapped(HEADLINES[self.verdict] + (f"; advised: {self.option}" if self.option else ""), width)
        )

    def lines(self) -> Iterator[str]:
        """The text in lines of [`WIDTH`], and the option in a line of its own, to be copied."""
        yield from _wrapped(self.text, WIDTH)
        if self.option:
            yield f"    {self.option}"


def recommend(
    tasks: Sequence[str], conflict: Estimate, layers: Sequence[Estimate], found: Separability, routed: bool
) -> Recommendation:
    """Advise on tasks from what has been measured.

    Args:
        tasks: their names.
        conflict: of a step on A and B of all layers at once.
        layers: of a step on A or B of one layer, for each of them.
        found: what tells the tasks apart.
        routed: whether the measured adapter routes, so that its tasks may be apart already.

    Returns:
        `figures` holds `measurable_tasks` of `tasks`; `from_others` and `from_others_error`, the mean over these of
        [`Estimate.from_others`]; `alike`, the mean gain from one other task's step; `harmed_tasks` by name;
        `harmed_layers`, the share of `layers` whose mean loss is [`LOSS`] or more; and `words`, `new_wordings`,
        `picture`, `likeness`, `wordings` and `shared_wordings` as in [`Separability`].
    """
    harmed = _harmed(tasks, conflict)
    measurable = [one for one in layers if math.isfinite(one.mean_from_others)]
    figures = {
        "tasks": len(tasks),
        "measurable_tasks": int(conflict.measurable.sum()),
        "from_others": conflict.mean_from_others,
        "from_others_error": conflict.mean_from_others_error,
        "alike": conflict.mean_from_others / (len(tasks) - 1),
        "harmed_tasks": harmed,
        "harmed_layers": sum(one.mean_from_others <= -LOSS for one in measurable) / max(1, len(measurable)),
        **asdict(found),
    }
    verdict = _verdict(conflict, harmed)
    sentences = [_conflict_in_words(verdict, figures)]
    if routed:
        sentences.append("This is so under the measured adapter's own routes, which may keep tasks apart already.")
    option, advice = _advice(verdict, found)
    return Recommendation(verdict, option, " ".join((*sentences, *advice)), figures)


def _harmed(tasks: Sequence[str], conflict: Estimate) -> list[str]:
    clear = conflict.from_others < -CLEAR_OF_MANY * conflict.from_others_error  # false where not measurable
    return [task for task, harm in zip(tasks, (clear & (conflict.from_others <= -LOSS)).tolist()) if harm]


def _verdict(conflict: Estimate, harmed: list[str]) -> str:
    T, mean, reach = len(conflict.measurable), conflict.mean_from_others, CLEAR * conflict.mean_from_others_error
    if int(conflict.measurable.sum()) < max(2.0, ENOUGH_TASKS * T):
        return "unclear"
    if len(harmed) >= HARMED_TASKS * T or (mean <= -LOSS and mean + reach < 0):
        return "interfere"
    if (mean - reach) / (T - 1) > ALIKE:
        return "alike"
    if mean - reach > -LOSS and (mean + reach) / (T - 1) < ALIKE:
        return "apart"
    return "unclear"


def _conflict_in_words(verdict: str, figures: dict[str, Any]) -> str:
    headline = HEADLINES[verdict]
    if figures["measurable_tasks"] == 0:
        return f"{headline}: no task's own step helps it measurably."
    together = (
        f"{headline}: a step on each of the other tasks adds up to {figures['from_others']:+.2f} ± "
        f"{figures['from_others_error']:.2f} (standard error) of what a task's own step gains, the mean of "
        f"{figures['measurable_tasks']} of {figures['tasks']} tasks"
    )
    if verdict == "unclear":
        return f"{together}."
    named = f"; clearly harmed: {', '.join(figures['harmed_tasks'])}" if figures["harmed_tasks"] else ""
    if verdict != "interfere":
        return f"{together}; a step on one of them gives {figures['alike']:.2f} of it{named}."
    return f"{together}{named}. It is -{LOSS} or less in {figures['harmed_layers']:.0%} of the layers' A and B."


def _advice(verdict: str, found: Separability) -> tuple[str | None, list[str]]:
    if verdict == "unclear":
        return None, [MORE_DATA]
    if verdict == "alike":
        return PLAIN, [ENOUGH]
    option, reason, advice = _by_what(found)
    if verdict == "apart":
        return PLAIN, [reason, FIRST_PLAIN, advice]
    return option, [reason, advice, COMPARE] if option else [reason, advice]


def _by_what(found: Separability) -> tuple[str | None, str, str]:
    """The option, the figures for it in words, and the advice."""
    words, picture = _tells(found.words), _tells(found.picture)
    seen, new = found.words, found.new_wordings
    reason = f"Of what is left out, the task is told by the instruction's mean word vector for {_shown(seen)}, "
    reason += f"where its wording is left out too for {_shown(new)}, " if new else "where each task has one wording, "
    reason += f"and by the picture for {_shown(found.picture)}."
    if words and found.likeness >= ONE_ROUTE:
        return BY_WORDS, reason, f"Routing can help, by the instruction's words, which name the tasks: try {BY_WORDS}."
    if words:
        return (
            BY_LABELS,
            f"{reason} Wordings vary, {found.wordings:.1f} for a task, with a mean cosine of {found.likeness:.2f}.",
            "Routing can help, by the instruction's words, with the tasks' labels to bring a task's wordings onto one "
            f"route: try {BY_LABELS}.",
        )
    if picture:
        return BY_PICTURE, reason, f"Routing can help, by the pictures, which tell the tasks: try {BY_PICTURE}."
    if words is None or picture is None:
        return (
            None,
            reason,
            "That is not enough data to tell whether routes could follow the tasks: ask for more --samples.",
        )
    if found.shared_wordings >= TELLING:
        return (
            None,
            f"{reason} {found.shared_wordings:.0%} of the instructions are asked in several tasks, to the letter.",
            "Routes cannot tell these tasks apart, so routing would not help: name the task in the instruction, or "
            "train one LoRA for each.",
        )
    return (
        BY_INSTRUCTION,
        reason,
        "Words alone do not name the tasks; the layers may still understand what the words' mean does not show, which "
        f"is not measured here: try {BY_INSTRUCTION}.",
    )


def _tells(told: Told | None) -> bool | None:
    """None: the interval holds the bound."""
    if told is None:
        return False
    bound = told.chance + TELLING * (1 - told.chance)
    return True if told.low >= bound else False if told.high < bound else None


def _shown(told: Told | None) -> str:
    if told is None:
        return "none, since there is only one"
    interval = f"95% interval {told.low:.0%} to {told.high:.0%}"
    return f"{told.share:.0%} ({interval}, chance {told.chance:.0%}, n={told.count})"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)  # flags stay whole
