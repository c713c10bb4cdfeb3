"""Twelve instruction tasks that disagree about how to answer, on two sets of real images, in LLaVA's JSON format.

Images: easy-VQA (https://github.com/vzhou842/easy-VQA, MIT; one coloured shape per 64x64 picture, with its own
questions) and scikit-learn's handwritten digits (8x8, enlarged to 64x64). Both are on disk once their PyPI packages
are installed, so nothing is downloaded here.

One picture of a blue circle is "circle" to one task, "blue", "b", "0", "a blue circle", "yes" or "no" to the others.
That is the situation in which tasks that share one adapter pull it in different directions.

    python -m playground.data.tasks --output data
"""

import argparse
import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from playground.atomic import atomic_directory, write_json
from playground.require import require

TRAIN_PER_TASK = 800
HELDOUT_PER_TASK = 200
HELDOUT_DIGITS = 400
IMAGE_SIZE = 64

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CORNERS = {"circle": "0", "rectangle": "4", "triangle": "3"}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def build(output_dir: Path, seed: int = 0) -> None:
    """Write the data set into the folder ``output_dir``, which appears only when it is complete.

    Files, the same bytes for the same seed:

    - ``images/*.png``: 64x64 RGB. The ``image`` of a question is a name in this folder (LLaVA's ``--image_folder``).
    - ``images.json``: what each picture shows: ``image``, ``split``, and ``shape`` and ``color``, or ``digit``.
    - ``train.json``: 800 questions for each task, shuffled, on training pictures.
    - ``heldout.json``: 200 questions for each task, task after task, on pictures that no other file asks about.
    - ``describe.json``: descriptions of the training pictures for the base model, shuffled. They show every fact and
      every word that the tasks use, under prompts and in forms that no task has.
    - ``tasks.json``: each task's name with one held-out question and its answer.

    easy-VQA keeps its own division into training and test pictures; of the digits, 400 are drawn for the held-out part.

    Raises:
        SystemExit: easy-vqa or scikit-learn is not installed; the message names the pip command.
        FileExistsError: ``output_dir`` holds something else than an earlier result.
    """
    with atomic_directory(output_dir, marker="tasks.json") as folder:
        images = folder / "images"
        images.mkdir()
        pictures = [*_shape_pictures(images), *_digit_pictures(images, seed)]
        train, heldout = [], []
        for task in TASKS:
            train += _examples(task, pictures, "train", TRAIN_PER_TASK, seed)
            heldout += _examples(task, pictures, "heldout", HELDOUT_PER_TASK, seed)
        random.Random(f"{seed} train").shuffle(train)
        write_json(folder / "images.json", [picture.facts() for picture in pictures])
        write_json(folder / "train.json", train)
        write_json(folder / "heldout.json", heldout)
        write_json(folder / "describe.json", _descriptions(pictures, seed))
        write_json(folder / "tasks.json", _summary(heldout))


@dataclass(frozen=True)
class Picture:
    """One image and what it shows: a shape with its colour, or a digit.

    Attributes:
        image: file name in the image folder.
        split: ``train`` or ``heldout``.
        questions: easy-VQA's own (question, answer) pairs about this picture.
    """

    image: str
    split: str
    shape: str | None = None
    color: str | None = None
    digit: int | None = None
    questions: tuple[tuple[str, str], ...] = ()

    def facts(self) -> dict[str, str | int]:
        """What ``images.json`` says about this picture."""
        shown = {"shape": self.shape, "color": self.color, "digit": self.digit}
        return {"image": self.image, "split": self.split} | {k: v for k, v in shown.items() if v is not None}


@dataclass(frozen=True)
class Candidate:
    """One possible question. ``stratum`` groups those among which a task's sample is balanced."""

    image: str
    question: str
    answer: str
    stratum: tuple[str, ...]


# --- the tasks ------------------------------------------------------------------------------------------------------
# Each yields (question, answer, stratum) for one picture. In the yes/no tasks the stratum joins the thing asked about
# with the answer, so that no question is answered better than by chance without looking at the picture.

Asked = Iterator[tuple[str, str, tuple[str, ...]]]


def _shape(picture: Picture) -> Asked:
    for question, answer in picture.questions:
        if answer in SHAPES:
            yield question, answer, (answer,)


def _color(picture: Picture) -> Asked:
    for question, answer in picture.questions:
        if answer in COLORS:
            yield question, answer, (answer,)


def _presence(picture: Picture) -> Asked:
    for question, answer in picture.questions:
        if answer in ("yes", "no") and not _is_negated(question):
            yield question, answer, (_thing(question), answer)


def _absence(picture: Picture) -> Asked:
    for question, answer in picture.questions:
        if answer in ("yes", "no") and _is_negated(question):
            yield question, answer, (_thing(question), answer)


def _caption(picture: Picture) -> Asked:
    for question in ("describe the image.", "caption the image.", "what does the image show?"):
        answer = f"a {picture.color} {picture.shape}"
        yield question, answer, (answer,)


def _corners(picture: Picture) -> Asked:
    for question in ("how many corners does the shape have?", "count the corners of the shape in the image."):
        yield question, CORNERS[picture.shape], (picture.shape,)


def _initial(picture: Picture) -> Asked:
    for question in (
        "what letter does the color of the shape start with?",
        "what is the first letter of the color of the shape?",
        f"what is the first letter of the color of the {picture.shape}?",
    ):
        yield question, picture.color[0], (picture.color[0],)


def _digit(picture: Picture) -> Asked:
    for question in ("what digit is this?", "what number is in the image?", "what digit does the image show?"):
        yield question, str(picture.digit), (str(picture.digit),)


def _word(picture: Picture) -> Asked:
    for question in ("what is the word for this digit?", "spell the number in the image.", "spell this digit."):
        yield question, WORDS[picture.digit], (str(picture.digit),)


def _parity(picture: Picture) -> Asked:
    for question in ("is this number even or odd?", "is the digit in the image odd or even?"):
        yield question, _even_or_odd(picture.digit), (str(picture.digit),)


def _comparison(picture: Picture) -> Asked:
    for threshold in range(9):
        answer = "yes" if picture.digit > threshold else "no"
        for question in (f"is this digit greater than {threshold}?", f"is the number in the image above {threshold}?"):
            yield question, answer, (str(threshold), answer)


def _successor(picture: Picture) -> Asked:
    for question in ("what number comes after this digit?", "what number comes after the number in the image?"):
        yield question, str(picture.digit + 1), (str(picture.digit),)


TASKS: dict[str, Callable[[Picture], Asked]] = {
    "shape": _shape,
    "color": _color,
    "presence": _presence,
    "absence": _absence,
    "caption": _caption,
    "corners": _corners,
    "initial": _initial,
    "digit": _digit,
    "word": _word,
    "parity": _parity,
    "comparison": _comparison,
    "successor": _successor,
}
DIGIT_TASKS = frozenset({"digit", "word", "parity", "comparison", "successor"})


def _is_negated(question: str) -> bool:
    return " not " in question or question.startswith("is no ")


def _thing(question: str) -> str:
    """The one shape or colour that a yes/no question of easy-VQA asks about."""
    (thing,) = set(question.rstrip("?").split()) & {*SHAPES, *COLORS}
    return thing


def _even_or_odd(digit: int) -> str:
    return ("even", "odd")[digit % 2]


# --- descriptions for the base model --------------------------------------------------------------------------------
# The adapters move attention and features, but the base model's word vectors stay as they are. So each word of the
# tasks, "yes" and "no" and the question words too, has to occur here, in a form that answers no task.


def _shape_styles(picture: Picture, rng: random.Random) -> list[tuple[str, str]]:
    shape, color = picture.shape, picture.color
    other_shape = rng.choice([s for s in SHAPES if s != shape])
    other_color = rng.choice([c for c in COLORS if c != color])
    shapes = rng.sample(SHAPES, 3)
    colors = rng.sample([color, *rng.sample([c for c in COLORS if c != color], 2)], 3)
    return [
        ("what is there in this picture?", f"there is a {color} {shape} on a light background and no other shape."),
        ("describe the parts of this picture in a list.", f"shape: {shape}. color: {color}."),
        ("tell me about this picture.", f"the shape is a {shape} and its color is {color}."),
        ("spell it out.", f"{color} is what this is, and the first letter to start with is {color[0]}."),
        ("how does it look?", f"count how many corners the {color} {shape} does have: {CORNERS[shape]}."),
        ("is this or that shape present? check each.", " ".join(f"{s}: {_yes_or_no(s == shape)}." for s in shapes)),
        ("does it show this or that color? check each.", " ".join(f"{c}: {_yes_or_no(c == color)}." for c in colors)),
        (
            "caption what is true and what is not.",
            f"the image does contain a {shape}, not a {other_shape}. it is {color}, no {other_color} shape is present.",
        ),
    ]


def _digit_styles(picture: Picture, rng: random.Random) -> list[tuple[str, str]]:
    digit, word, parity = picture.digit, WORDS[picture.digit], _even_or_odd(picture.digit)
    other = {"even": "odd", "odd": "even"}[parity]
    low, high = sorted(rng.sample(range(9), 2))
    return [
        ("what is there in this picture?", f"there is a handwritten {word}, the number {digit}, an {parity} digit."),
        ("describe the parts of this picture in a list.", f"digit: {digit}. word: {word}."),
        ("spell it out.", f"this digit is {digit}, and the word for it is {word}."),
        ("tell me about this picture.", f"it is {parity}, not {other}: {word} or {digit}."),
        ("count on.", f"{digit} comes first, and after it comes the number {digit + 1}."),
        (
            "is it above this or that? check each.",
            f"above {low}: {_yes_or_no(digit > low)}. greater than {high}: {_yes_or_no(digit > high)}.",
        ),
    ]


def _yes_or_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _descriptions(pictures: Iterable[Picture], seed: int) -> list[dict]:
    """Two styles for each training shape and all six for each training digit, about 8,000 of each kind."""
    rng = random.Random(f"{seed} describe")
    made = []
    for picture in pictures:
        if picture.split != "train":
            continue
        styles = rng.sample(_shape_styles(picture, rng), 2) if picture.digit is None else _digit_styles(picture, rng)
        made += [(picture.image, prompt, text) for prompt, text in styles]
    rng.shuffle(made)
    return [_conversation(f"describe-{n:05d}", "describe", *pair) for n, pair in enumerate(made)]


# --- sampling -------------------------------------------------------------------------------------------------------


def _examples(task: str, pictures: Iterable[Picture], split: str, count: int, seed: int) -> list[dict]:
    """``count`` different questions of ``task`` on pictures of ``split``, as even over the strata as the data allow."""
    strata: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for picture in pictures:
        if picture.split == split and (picture.digit is not None) == (task in DIGIT_TASKS):
            # easy-VQA asks a few questions twice about one picture.
            for question, answer, stratum in dict.fromkeys(TASKS[task](picture)):
                strata[stratum].append(Candidate(picture.image, question, answer, stratum))
    rng = random.Random(f"{seed} {split} {task}")
    queues = [strata[stratum] for stratum in sorted(strata)]
    available = sum(map(len, queues))
    if available < count:
        raise ValueError(f"task {task!r} has {available} {split} questions, expected {count}: is easy-vqa complete?")
    for queue in queues:
        rng.shuffle(queue)
    chosen: list[Candidate] = []
    while len(chosen) < count:
        # One of each stratum in turn. Strata of one thing are neighbours (yes beside no), so a last, partial round
        # is off balance by one at most.
        queues = [queue for queue in queues if queue]
        chosen += [queue.pop() for queue in queues[: count - len(chosen)]]
    return [
        _conversation(f"{task}-{split}-{n:04d}", task, candidate.image, candidate.question, candidate.answer)
        for n, candidate in enumerate(chosen)
    ]


def _conversation(name: str, task: str, image: str, question: str, answer: str) -> dict:
    """One entry of LLaVA's training JSON, plus the key ``task``, which upstream ignores."""
    return {
        "id": name,
        "image": image,
        "task": task,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def _summary(heldout: list[dict]) -> list[dict[str, str]]:
    first = {example["task"]: example for example in reversed(heldout)}
    return [
        {
            "name": task,
            "question": first[task]["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": first[task]["conversations"][1]["value"],
            "image": first[task]["image"],
        }
        for task in TASKS
    ]


# --- pictures -------------------------------------------------------------------------------------------------------


def _shape_pictures(images: Path) -> list[Picture]:
    """Copy easy-VQA's images and gather what its questions say about each."""
    source = Path(require("easy_vqa", "easy-vqa").__file__).parent / "data"
    pictures = []
    for folder, split in (("train", "train"), ("test", "heldout")):
        asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, number in json.loads((source / folder / "questions.json").read_text(encoding="utf-8")):
            asked[number].append((question, answer))
        for number, questions in tqdm(sorted(asked.items()), desc=f"shapes, {split}", unit="image"):
            name = f"shape-{split}-{number:04d}.png"
            shutil.copyfile(source / folder / "images" / f"{number}.png", images / name)
            shape, color = _shown(questions, SHAPES), _shown(questions, COLORS)
            if shape and color:
                pictures.append(Picture(name, split, shape=shape, color=color, questions=tuple(questions)))
    return pictures


def _shown(questions: list[tuple[str, str]], names: tuple[str, ...]) -> str | None:
    """The one of ``names`` that a picture shows, by its questions; None where they do not tell."""
    for question, answer in questions:
        if answer in names:
            return answer
        if question.startswith("what "):
            # "what color is the circle?" tells the shape.
            told = set(question.rstrip("?").split()) & set(names)
            if told:
                return told.pop()
        if answer in ("yes", "no") and (answer == "yes") != _is_negated(question) and _thing(question) in names:
            return _thing(question)
    return None


def _digit_pictures(images: Path, seed: int) -> list[Picture]:
    """Enlarge scikit-learn's digits (8x8, ink 0 to 16) to white-on-black RGB images."""
    data = require("sklearn.datasets", "scikit-learn").load_digits()
    order = list(range(len(data.target)))
    random.Random(f"{seed} digits").shuffle(order)
    heldout = set(order[:HELDOUT_DIGITS])
    pictures = []
    for number, (ink, digit) in enumerate(zip(tqdm(data.images, desc="digits", unit="image"), data.target)):
        split = "heldout" if number in heldout else "train"
        name = f"digit-{split}-{number:04d}.png"
        image = Image.fromarray((ink * (255 / 16)).astype("uint8"))
        image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB").save(images / name)
        pictures.append(Picture(name, split, digit=int(digit)))
    return pictures


def main() -> None:
    """Command line: build the data set and print how many questions each task has."""
    parser = argparse.ArgumentParser(description="Build the twelve playground tasks in LLaVA's JSON format.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; an earlier result is replaced")
    parser.add_argument("--seed", type=int, default=0, help="seed of the digit split and of every draw (default: 0)")
    arguments = parser.parse_args()
    try:
        build(arguments.output, arguments.seed)
    except FileExistsError as error:
        raise SystemExit(str(error)) from None
    for part in ("train", "heldout", "describe"):
        examples = json.loads((arguments.output / f"{part}.json").read_text(encoding="utf-8"))
        counts = Counter(example["task"] for example in examples)
        print(f"{part}: {len(examples)} (" + ", ".join(f"{task} {count}" for task, count in counts.items()) + ")")


if __name__ == "__main__":
    main()
