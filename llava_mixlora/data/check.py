"""One reading of a data file: what can be trained on, what is repaired, what is lost, and why."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import MixLoraError
from .conversations import Sample, Unusable, as_sample, images_of
from .entries import entries
from .images import HEADERS, image_problem
from .token_counts import TokenCounter

MANY = 50_000
"""Entries from which on a progress bar is shown."""
COUNTED = 2_000
"""Samples of which all tokens are counted; behind them, those of which not all surely fit, and every two hundredth."""
EVERY = 200
MAX_LOST_SHARE = 0.01
"""`--max_lost_share`: the largest share of entries that a run goes without."""
NAMED = 5  # entries that the table names for each reason


@dataclass
class Found:
    """Entries to which something applies: how many, the first of their numbers, and what is said of the first."""

    count: int = 0
    numbers: list[int] = field(default_factory=list)
    detail: str = ""

    def add(self, number: int, detail: str = "") -> None:
        self.detail = self.detail or detail
        self.count += 1
        if len(self.numbers) < NAMED:
            self.numbers.append(number)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.numbers) else ""
        return f"entr{'y' if self.count == 1 else 'ies'} {', '.join(map(str, self.numbers))}{more}"


@dataclass
class Tokens:
    """Lengths of samples in tokens, and the supervised ones among them, of those that were counted."""

    limit: int
    image_tokens: int
    counted: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    longest_entry: int = 0
    cut: Found = field(default_factory=Found)


@dataclass
class DataCheck:
    """What a data file holds. Entries are numbered from 0, in the order of the file.

    Args:
        path: the file.
        entries: how many it has.
        samples: those that can be trained on, in LLaVA's form, where they were to be kept.
        numbers: the entries that they come from.
        lost: entries that cannot be trained on, by reason.
        repaired: entries that can, once something was put right, by what.
        tokens: None without a tokenizer.
    """

    path: str
    entries: int = 0
    samples: list[Sample] | None = None
    numbers: array = field(default_factory=lambda: array("q"))
    with_images: int = 0
    several_turns: int = 0
    lost: dict[str, Found] = field(default_factory=dict)
    repaired: dict[str, Found] = field(default_factory=dict)
    tokens: Tokens | None = None

    @property
    def usable(self) -> int:
        return len(self.numbers)

    def leave_out(self, lost: set[int]) -> None:
        """Forget the samples that come from these entries."""
        kept = [place for place, number in enumerate(self.numbers) if number not in lost]
        if len(kept) == self.usable:
            return
        if self.samples is not None:
            self.samples = [self.samples[place] for place in kept]
        self.numbers = array("q", (self.numbers[place] for place in kept))

    def refuse_losses(self, max_lost_share: float, flag: str = "--max_lost_share") -> None:
        """Refuse data of which more than a share is lost, or all.

        Raises:
            MixLoraError: names the first entry that is lost, and the reasons with their numbers.
        """
        lost = self.entries - self.usable
        if lost == 0 or (self.usable and lost <= max_lost_share * self.entries):
            return
        first = min(self.lost.values(), key=lambda found: found.numbers[0])
        reasons = ", ".join(f"{found.count} {reason}" for reason, found in self.lost.items())
        share = f"more than {flag} {max_lost_share:g} allows" if self.usable else "nothing is left to learn"
        raise MixLoraError(
            f"{self.path}: entry {first.numbers[0]}: {first.detail} ({lost} of {self.entries} entries teach nothing, "
            f"{share}: {reasons})"
        )

    def table(self) -> str:
        """What was found, in lines."""
        alone = self.usable - self.with_images
        lines = [f"{self.path}: {self.entries:,} entries"]
        lines.append(
            f"  samples           {self.usable:>9,}  {self.with_images:,} with images, {alone:,} of text alone, "
            f"{self.several_turns:,} of several turns"
        )
        if self.tokens is not None and self.tokens.counted:
            lines += self._token_lines(self.tokens)
        lines += [f"  repaired          {found.count:>9,}  {what}; {found}" for what, found in self.repaired.items()]
        lines += [f"  nothing to learn  {found.count:>9,}  {why}; {found}" for why, found in self.lost.items()]
        if not self.lost:
            lines.append(f"  nothing to learn  {0:>9,}")
        return "\n".join(lines)

    def _token_lines(self, tokens: Tokens) -> Iterator[str]:
        some = "" if tokens.counted == self.usable else f" (of {tokens.counted:,} samples that were counted)"
        yield (
            f"  tokens            {tokens.tokens // tokens.counted:>9,}  on average, {tokens.image_tokens} of an image "
            f"included{some}; longest {tokens.longest:,} (entry {tokens.longest_entry})"
        )
        yield f"  supervised        {tokens.supervised // tokens.counted:>9,}  on average"
        where = f"; {tokens.cut}" if tokens.cut.count else ""
        yield f"  cut               {tokens.cut.count:>9,}  by --model_max_length {tokens.limit:,}{where}"

    def to_dict(self) -> dict[str, Any]:
        """The same for programs: counts, and by reason the count and the first entries."""

        def told(by_reason: dict[str, Found]) -> dict[str, Any]:
            return {why: {"count": found.count, "first_entries": found.numbers} for why, found in by_reason.items()}

        told_of = {"data": self.path, "entries": self.entries, "samples": self.usable}
        told_of |= {"with_images": self.with_images, "several_turns": self.several_turns}
        told_of |= {"repaired": told(self.repaired), "lost": told(self.lost)}
        if self.tokens is not None:
            of_tokens = {name: value for name, value in vars(self.tokens).items() if name != "cut"}
            told_of["tokens"] = of_tokens | {"cut": self.tokens.cut.count}
        return told_of


def check_data(
    path: str | Path,
    image_folder: str | Path | None = None,
    *,
    images: str = HEADERS,
    padded: bool = False,
    counter: TokenCounter | None = None,
    keep: bool = False,
) -> DataCheck:
    """Read a data file once, entry by entry; shows a progress bar from [`MANY`] entries on.

    Args:
        path: a file as [`entries`] reads it.
        image_folder: what images' names are relative to; the current folder when None.
        images: how far images are checked, of [`images.CHECKS`].
        padded: whether images will be padded to squares.
        counter: counts tokens; they are left out when None.
        keep: keep the samples.

    Raises:
        MixLoraError: the file cannot be read, is not JSON, or holds no entries.
    """
    found = DataCheck(str(path), samples=[] if keep else None)
    if counter is not None:
        found.tokens = Tokens(counter.limit, counter.image_tokens)
    looked_at: dict[str, str | None] = {}
    shapes: Counter[tuple[bool, int]] = Counter()
    for number, entry in enumerate(_with_progress(entries(path))):
        found.entries += 1
        try:
            sample, repairs = as_sample(entry)
            for image in images_of(sample):
                if image not in looked_at:
                    file = os.path.join(image_folder or "", image)
                    looked_at[image] = problem = image_problem(file, images, padded)
                    looked_at[image] = None if problem is None else f"{file}: {problem}"
                if looked_at[image] is not None:
                    raise Unusable("its image cannot be used", looked_at[image])
            if counter is not None:
                _count_tokens(found.tokens, counter, sample, number, shapes)
        except Unusable as error:
            found.lost.setdefault(error.reason, Found()).add(number, str(error))
            continue
        for repair in repairs:
            found.repaired.setdefault(repair, Found()).add(number)
        found.numbers.append(number)
        found.with_images += "image" in sample
        found.several_turns += len(sample["conversations"]) > 2
        if keep:
            found.samples.append(sample)
    return found


def _with_progress(of_file: Iterator[Any]) -> Iterator[Any]:
    progress = None
    for number, entry in enumerate(of_file):
        if number == MANY:
            progress = tqdm(desc="Checking the data", unit="entry", initial=MANY)
        if progress is not None:
            progress.update()
        yield entry
    if progress is not None:
        progress.close()


def _count_tokens(
    tokens: Tokens, counter: TokenCounter, sample: Sample, number: int, shapes: Counter[tuple[bool, int]]
) -> None:
    """Add a sample's tokens to `tokens`; among many samples of a shape that is known to work, only where needed."""
    shape = ("image" in sample, len(sample["conversations"]))
    shapes[shape] += 1
    is_known = number >= COUNTED and shapes[shape] > EVERY and number % EVERY != 0
    if is_known and counter.surely_fits(sample):
        return
    count = counter.count(sample)
    tokens.counted += 1
    tokens.tokens += count.tokens
    tokens.supervised += count.supervised
    if count.tokens > tokens.longest:
        tokens.longest, tokens.longest_entry = count.tokens, number
    if count.tokens > tokens.limit:
        tokens.cut.add(number)
