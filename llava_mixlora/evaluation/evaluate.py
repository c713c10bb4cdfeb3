"""`llava-mixlora eval`: a model's answers to the questions of a benchmark, and their scores.

The output folder holds `answers.jsonl` (also read by upstream's evaluation programs), `scores.json` and `scores.md`.
While answers are made, each process appends its own to `answers.part-RANK.jsonl`; whatever ends the run, the same
command asks only what has no answer yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import distributed

from ..adapters.adapter_folder import is_adapter
from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..adapters.reading import read_any_config
from ..errors import MixLoraError
from ..folder_lock import locked
from ..inference.conversation import conversation_of
from ..inference.model_flags import add_model_flags, choices_of
from ..inputs import check_writable, positive, read_json
from ..writing import write_whole
from .json_lines import append_lines, read_lines
from .metrics import contained_match, exact_match, mme, normalised, pope
from .questions import Question, is_mme, read_questions

ANSWERS, PARTS, RUN, SCORES, TABLE = "answers.jsonl", "answers.part-*.jsonl", "run.json", "scores.json", "scores.md"
Answers = dict[str, dict[str, Any]]
"""Lines of `answers.jsonl` by question id."""


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Describe the command `eval` to its parser."""
    parser.description = (
        "Ask a model (a MixLoRA adapter, LLaVA's own LoRA or a whole LLaVA) all questions of a benchmark, in batches, "
        "and score its answers. An interrupted run goes on where it stopped; under torchrun or accelerate launch the "
        "processes share the questions."
    )
    parser.epilog = (
        "example: llava-mixlora eval --model-path output/llava-mixlora --questions mm_tasks/text_vqa.jsonl "
        "--output scores"
    )
    parser.add_argument("--model-path", required=True, metavar="MODEL", help="folder of the adapter or model")
    parser.add_argument("--model-base", metavar="BASE", help="the adapter's base (default: the one that it names)")
    parser.add_argument(
        "--questions",
        required=True,
        metavar="PATH",
        help="the authors' JSON Lines, LLaVA's question file or training data, a folder of such files, or MME's folder",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for answers and scores")
    parser.add_argument("--image-folder", metavar="DIR", help="where images lie (default: beside the questions)")
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most so many questions of each task")
    parser.add_argument("--batch-size", type=positive, default=16, help="questions at a time (default: 16)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="longest answer (default: 128)")
    parser.add_argument("--conv-mode", help="conversation template (default: that of its training, or llava_v1)")
    parser.add_argument("--bits", type=int, default=16, choices=(16, 8, 4), help="8 or 4: quantize the model")
    parser.add_argument("--judge", metavar="LM", help="a causal language model that decides what is right as well")
    add_model_flags(parser)
    parser.set_defaults(command=_eval)


def _eval(given: argparse.Namespace) -> None:
    questions = read_questions(given.questions, given.image_folder, given.task, given.limit)
    asking = Asking(
        given.model_path,
        given.model_base,
        conversation_of(given.model_path, given.conv_mode, "--conv-mode", otherwise="llava_v1"),
        given.max_new_tokens,
        given.bits,
        choices_of(given),
    )
    try:
        result = evaluate(asking, questions, Path(given.output), given.batch_size, given.judge)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{given.output} keeps the answers so far; the same command asks only what has none"
        ) from None
    if result is not None:
        print(table(result))
        print(f"\nWrote answers.jsonl, scores.json and scores.md to {given.output}")


@dataclass(frozen=True)
class Asking:
    """How a model is asked: what decides its answers. `bits`: 16, or 8 or 4 for a quantized language model."""

    model_path: str
    model_base: str | None = None
    conversation: str = "llava_v1"
    max_new_tokens: int = 128
    bits: int = 16
    choices: ModelChoices = AS_NAMED


def evaluate(
    asking: Asking, questions: list[Question], output: Path, batch_size: int = 16, judge: str | None = None
) -> dict[str, Any] | None:
    """Answer what has no answer in `output` yet, and score all answers.

    Under `torchrun` or `accelerate launch` the processes share the questions; every one needs to call this.

    Args:
        asking: the model, and how it is asked.
        questions: those of [`questions.read_questions`].
        output: a folder, made if need be; answers of an interrupted run in it are kept.
        batch_size: questions that are answered at a time.
        judge: a causal language model, a folder or a hub name, that decides whether answers are right.

    Returns:
        The contents of `scores.json` in the first process, None in the others.

    Raises:
        MixLoraError: `output` holds the answers of another model or to other questions, or cannot be written; or the
            model cannot be loaded.
    """
    if is_adapter(asking.model_path):
        read_any_config(asking.model_path)  # before anything is written
    _join_processes()
    check_writable(output, "--output")
    with locked(output, "--output"):
        return _evaluate(asking, questions, output, batch_size, judge)


def _evaluate(
    asking: Asking, questions: list[Question], output: Path, batch_size: int, judge: str | None
) -> dict[str, Any] | None:
    first = _rank() == 0
    pending = None
    if first:
        _check_same_run(output, asking)
        answered = _collect(output, questions)
        pending = [question.id for question in questions if question.id not in answered]
        if answered:
            print(f"{len(answered)} of {len(questions)} questions have been answered before", flush=True)
    pending = set(_broadcast(pending))
    _answer([question for question in questions if question.id in pending], asking, output, batch_size)
    if _world_size() > 1:
        distributed.barrier()
    if not first:
        return None
    answers = _collect(output, questions)
    verdicts = {}
    if judge is not None:
        from .judge import judge_answers

        verdicts = judge_answers(judge, questions, answers, output, batch_size)
    result = scores(questions, answers, verdicts)
    write_whole(output / SCORES, json.dumps({"run": asdict(asking), **result}, indent=2) + "\n")
    write_whole(output / TABLE, table(result) + "\n")
    return result


def scores(questions: list[Question], answers: Answers, verdicts: dict[str, bool] | None = None) -> dict[str, Any]:
    """Scores by task in percent, of questions with a target; MME's by subtask, with its totals in points.

    `exact` and `contained` are shares of matches. Tasks whose targets are all yes or no get POPE's figures too, and
    those that `verdicts` cover `judged`, the share of answers that a judge holds to be right.
    """
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    tasks = {task: _of_task(asked, answers, verdicts or {}) for task, asked in by_task.items()}
    result: dict[str, Any] = {"tasks": tasks}
    exact = [row["exact"] for row in tasks.values() if "exact" in row]
    if exact:
        result["mean_exact"] = round(sum(exact) / len(exact), 2)
    if is_mme(list(by_task)):
        found = mme(
            [question.task for question in questions],
            [str(question.image) for question in questions],
            [answers[question.id]["text"] for question in questions],
            [question.target for question in questions],
        )
        result["mme"] = {
            name: {k: round(v, 2) for k, v in value.items()} if isinstance(value, dict) else round(value, 2)
            for name, value in asdict(found).items()
        }
    return result


def table(result: dict[str, Any]) -> str:
    """The scores as a Markdown table."""
    names = list(dict.fromkeys(name for row in result["tasks"].values() for name in row))
    lines = ["| task | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for task, row in result["tasks"].items():
        cells = ["" if name not in row else str(row[name]) for name in names]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    if "mean_exact" in result:
        lines += ["", f"Mean of exact matches over the tasks: {result['mean_exact']}%"]
    if "mme" in result:
        found = result["mme"]
        lines += ["", "| subtask of MME | accuracy | accuracy+ | score |", "| --- | --- | --- | --- |"]
        for subtask, accuracy in found["accuracy"].items():
            plus = found["accuracy_plus"][subtask]
            lines.append(f"| {subtask} | {accuracy} | {plus} | {round(accuracy + plus, 2)} |")
        lines.append(f"| **perception** | | | {found['perception']} |")
        lines.append(f"| **cognition** | | | {found['cognition']} |")
    return "\n".join(lines)


def _of_task(asked: list[Question], answers: Answers, verdicts: dict[str, bool]) -> dict[str, Any]:
    row: dict[str, Any] = {"questions": len(asked)}
    known = [question for question in asked if question.target is not None]
    if not known:
        return row
    texts, targets = [answers[question.id]["text"] for question in known], [question.target for question in known]
    row["exact"] = _percent(map(exact_match, texts, targets))
    row["contained"] = _percent(map(contained_match, texts, targets))
    if {normalised(target) for target in targets} <= {"yes", "no"}:
        row |= {name: round(100 * value, 2) for name, value in asdict(pope(texts, targets)).items()}
    judged = [verdicts[question.id] for question in known if question.id in verdicts]
    if judged:
        row["judged"] = _percent(judged)
    return row


def _percent(hits: Iterable[bool]) -> float:
    hits = list(hits)
    return round(100 * sum(hits) / len(hits), 2)


def _answer(questions: list[Question], asking: Asking, output: Path, batch_size: int) -> None:
    """Answer this process's share of the questions, and append each batch to its part as soon as it is done."""
    if not questions:
        return
    from .. import patches
    from ..adapters.its_llava import use_its_llava
    from ..inference.loading import load_for_inference
    from .answering import answer, check_conversation

    use_its_llava(asking.model_path)
    patches.apply()  # without them LLaVA cannot be imported
    check_conversation(asking.conversation)
    loaded = load_for_inference(
        asking.model_path,
        asking.model_base,
        asking.bits,
        choices=asking.choices,
    )
    # Prompts of like length share a batch, so little of it is padding; the processes take turns along the list.
    share = sorted(questions, key=lambda question: len(question.prompt))[_rank() :: _world_size()]
    name = Path(asking.model_path).name
    part = output / PARTS.replace("*", str(_rank()))
    done = answer(loaded, share, asking.conversation, batch_size, asking.max_new_tokens, progress=_rank() == 0)
    for batch, texts in done:
        lines = []
        for question, text in zip(batch, texts):
            line = {"question_id": question.id, "prompt": question.prompt, "text": text, "model_id": name}
            beside = {"task": question.task, "target": question.target, "image": str(question.image)}
            lines.append({**line, "metadata": beside})
        append_lines(part, lines)


def _collect(output: Path, questions: list[Question]) -> Answers:
    """All answers in the folder, put into `answers.jsonl` in the order of the questions.

    Raises:
        MixLoraError: a line is damaged, or answers a question that is not asked, or that was put differently.
    """
    parts = sorted(output.glob(PARTS))
    answers: Answers = {}
    for file in [output / ANSWERS, *parts]:
        lines = read_lines(file, {"question_id": str, "prompt": str, "text": str})
        answers |= {line["question_id"]: line for line in lines}
    asked = {question.id: question.prompt for question in questions}
    for identity, line in answers.items():
        if asked.get(identity) != line["prompt"]:
            raise MixLoraError(
                f"{output} holds answers to other questions, such as {identity!r}; choose another --output, or give "
                "the --questions, --task and --limit that it was made with"
            )
    if answers:
        ordered = [answers[question.id] for question in questions if question.id in answers]
        write_whole(output / ANSWERS, "".join(json.dumps(line) + "\n" for line in ordered))
    for part in parts:
        part.unlink()
    return answers


def _check_same_run(output: Path, asking: Asking) -> None:
    wanted = {**asdict(asking), "vision_tower": asking.choices.vision_tower, "adapter_sha256": None}
    del wanted["choices"]
    model = Path(asking.model_path)
    if model.exists():
        wanted["model_path"] = str(model.absolute())
    if (model / SAFETENSORS_WEIGHTS_NAME).is_file():
        wanted["adapter_sha256"] = hashlib.sha256((model / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()
    file = output / RUN
    if file.is_file():
        found = read_json(file)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise MixLoraError(
                    f"{output} holds answers of another run: {name} is {found.get(name)!r} there, but {value!r} here; "
                    "choose another --output, or remove it"
                )
    elif (output / ANSWERS).exists():
        raise MixLoraError(f"{output} holds answers, but no {RUN} that tells whose they are; choose another --output")
    write_whole(file, json.dumps(wanted, indent=2) + "\n")


def _join_processes() -> None:
    if _world_size() > 1 and not distributed.is_initialized():
        # Nothing but ids is exchanged. A process may wait for the others as long as their answers take.
        distributed.init_process_group("gloo", timeout=timedelta(days=7))


def _broadcast(value: Any) -> Any:
    if _world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
