"""Questions about images, in the formats that people have them in.

| what | form |
| --- | --- |
| the authors' data | JSON Lines, a file per task (`text_vqa.jsonl`, ...): `unique_id, prompt, target, image_path` |
| MME | a folder per subtask: images, and a text file for each with lines `question<TAB>Yes` |
| LLaVA's question files, POPE's | JSON Lines: `question_id, image, text`, perhaps `category`, and `label` or `answer` |
| LLaVA's training data | a JSON list with `conversations`; the first question is asked |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.conversations import read_conversations
from ..errors import MixLoraError
from ..inputs import check_regular, expanded, text_lines
from ..limits import how_to_raise, limits

IMAGE_TYPES = (".jpg", ".jpeg", ".png")
MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
EXPECTED = (
    "expected JSON Lines with unique_id, prompt, target, image_path, or with question_id, image, text; a JSON list of "
    "conversations; or MME's folder"
)


@dataclass(frozen=True)
class Question:
    """One question: `task` groups scores, `target` is the right answer where it is known, `image` a file."""

    id: str
    task: str
    prompt: str
    image: Path
    target: str | None = None


def read_questions(
    source: str | Path, image_folder: str | Path | None = None, tasks: Sequence[str] = (), limit: int | None = None
) -> list[Question]:
    """Read all questions of a file or folder.

    Args:
        source: a file, or a folder: MME's, or one of JSON Lines files.
        image_folder: what image names are relative to; by default the folder of the file.
        tasks: only these; all when empty.
        limit: at most so many of each task.

    Raises:
        MixLoraError: the source is missing, empty or of another form; a task is not in it; a question has no image, or
            one that is not there; two questions have the same id.
    """
    source = expanded(source)
    questions = _chosen(list(_read(source, image_folder)), source, tasks, limit)
    if not questions:
        raise MixLoraError(f"{source} holds no questions; {EXPECTED}")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise MixLoraError(f"{source}: two questions have the id {question.id!r}; give each one of its own")
        seen.add(question.id)
    missing = [question for question in questions if not question.image.is_file()]
    if missing:
        raise MixLoraError(
            f"{missing[0].image}: no such image, but question {missing[0].id!r} of {source} names it "
            f"({len(missing)} of {len(questions)} questions lack theirs); check --image-folder"
        )
    return questions


def is_mme(tasks: Sequence[str]) -> bool:
    """Whether all tasks are subtasks of MME."""
    return bool(tasks) and set(tasks) <= {*MME_PERCEPTION, *MME_COGNITION}


def _chosen(questions: list[Question], source: Path, tasks: Sequence[str], limit: int | None) -> list[Question]:
    known = dict.fromkeys(question.task for question in questions)
    for task in tasks:
        if task not in known:
            raise MixLoraError(f"--task {task}: {source} has no such task; its tasks are {', '.join(known) or 'none'}")
    counts: dict[str, int] = dict.fromkeys(known, 0)
    chosen = []
    for question in questions:
        counts[question.task] += 1
        if (not tasks or question.task in tasks) and (limit is None or counts[question.task] <= limit):
            chosen.append(question)
    return chosen


def _read(source: Path, image_folder: str | Path | None) -> Iterator[Question]:
    if source.is_dir():
        files = sorted(source.glob("*.jsonl"))
        if not files:
            yield from _read_mme(source)
        for file in files:
            yield from _read_lines(file, Path(image_folder or source), several=len(files) > 1)
    elif not source.exists():
        raise MixLoraError(f"{source}: no such file or folder; {EXPECTED}")
    elif source.suffix == ".json" and not _is_json_lines(source):
        yield from _read_conversations(source, Path(image_folder or source.parent))
    else:
        yield from _read_lines(source, Path(image_folder or source.parent), several=False)


def _is_json_lines(file: Path) -> bool:
    # POPE's label files are JSON Lines named .json.
    check_regular(file)
    with file.open(encoding="utf-8", errors="replace") as lines:
        return lines.readline(1024).lstrip().startswith("{")


def _read_lines(file: Path, image_folder: Path, several: bool) -> Iterator[Question]:
    for number, line in enumerate(text_lines(file, EXPECTED), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise MixLoraError(f"{file}, line {number}: not valid JSON ({error}); {EXPECTED}") from error
        except RecursionError:
            raise MixLoraError(f"{file}, line {number}: nested too deep; {EXPECTED}") from None
        yield _question(record, f"{file}, line {number}", file.stem, image_folder, several)


def _question(record: Any, place: str, task: str, image_folder: Path, several: bool) -> Question:
    names = set(record) if isinstance(record, dict) else set()
    of_authors = {"unique_id", "prompt"} <= names
    if not of_authors and not {"question_id", "text"} <= names:
        raise MixLoraError(f"{place}: no question; {EXPECTED}")
    image = record.get("image_path" if of_authors else "image")
    if not isinstance(image, str):
        raise MixLoraError(f"{place}: the question has no image; LLaVA's benchmarks ask about images, give one to each")
    text_field, id_field = ("prompt", "unique_id") if of_authors else ("text", "question_id")
    prompt, identity = record[text_field], str(record[id_field])
    if not isinstance(prompt, str):
        raise MixLoraError(f"{place}: {text_field} is {prompt!r:.80}; expected the text of a question")
    if of_authors:
        # The authors' program takes the brackets away before it asks.
        prompt, target = prompt.replace("[Options]", "Options"), record.get("target")
    else:
        target = record.get("label", record.get("answer"))
        task = record.get("category") if isinstance(record.get("category"), str) else task
    # Files number their questions independently of each other.
    identity = f"{task}/{identity}" if several else identity
    prompt = _asked(prompt, place)
    return Question(identity, task, prompt, image_folder / image, None if target is None else str(target))


def _asked(text: str, place: str) -> str:
    """What is asked: a question's text without the mark of its image."""
    if len(text) > (most := limits().prompt_letters):
        how = how_to_raise("prompt_letters")
        raise MixLoraError(f"{place}: a question of {len(text):,} letters, more than {most:,}; shorten it {how}")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise MixLoraError(f"{place}: holds half of a character (a lone surrogate); write the whole one")
    return text.replace("<image>", "").strip()


def _read_conversations(file: Path, image_folder: Path) -> Iterator[Question]:
    for number, sample in enumerate(read_conversations(file)):
        if not isinstance(sample.get("image"), str):
            raise MixLoraError(f"{file}: entry {number} has no image; LLaVA's benchmarks ask about images")
        asked, told = (turn["value"] for turn in sample["conversations"][:2])
        task = str(sample.get("task", file.stem))
        prompt = _asked(asked, f"{file}, entry {number}")
        yield Question(str(sample.get("id", number)), task, prompt, image_folder / sample["image"], told)


def _read_mme(folder: Path) -> Iterator[Question]:
    for subtask in sorted(path for path in folder.iterdir() if path.is_dir()):
        images = {path.stem: path for path in subtask.rglob("*") if path.suffix.lower() in IMAGE_TYPES}
        for file in sorted(subtask.rglob("*.txt")):
            if file.stem not in images:
                raise MixLoraError(f"{file}: no image {file.stem}.jpg or .png lies in {subtask}; is MME complete?")
            for number, line in enumerate(text_lines(file, EXPECTED)):
                if not line.strip():
                    continue
                prompt, tab, target = line.removesuffix("\n").rpartition("\t")
                if not tab:
                    raise MixLoraError(f"{file}, line {number + 1}: expected a question, a tab and Yes or No")
                yield Question(f"{subtask.name}/{file.stem}/{number}", subtask.name, prompt, images[file.stem], target)
