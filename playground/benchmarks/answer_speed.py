"""How much faster `llava-mixlora eval` answers than a program that asks one question at a time.

    python -m playground.benchmarks.answer_speed     # after scripts/finetune_mixlora.sh has trained the adapter

The embedded default's held-out questions, a few of each task, are answered one by one and in batches, taking turns in
one process; the answers must be the same. Writes `playground/results/answers_cpu.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import Question, read_questions
from llava_mixlora.inference.loading import load_for_inference
from playground import PLAYGROUND
from playground.answers import CONVERSATION, LONGEST_ANSWER
from playground.atomic import write_json
from playground.data.main_job import HELDOUT
from playground.embedded_default import IMAGES
from playground.measuring import machine

ONE_BY_ONE = 1


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.benchmarks.answer_speed", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--model", type=Path, default=PLAYGROUND / "output" / "llava-v1-tiny-mixlora", help="adapter folder"
    )
    parser.add_argument(
        "--data", type=Path, default=PLAYGROUND / "cache" / "data", help="folder of the held-out questions"
    )
    parser.add_argument("--per-task", type=int, default=8, help="questions of each task (default: 8)")
    parser.add_argument("--batch-size", type=int, default=48, help="questions at a time (default: 48)")
    parser.add_argument("--rounds", type=int, default=5, help="turns after one to warm up (default: 5)")
    parser.add_argument(
        "--results", type=Path, default=PLAYGROUND / "results" / "answers_cpu.json", help="file to write"
    )
    arguments = parser.parse_args()
    questions = read_questions(arguments.data / HELDOUT, arguments.data / IMAGES, limit=arguments.per_task)
    results = compare(arguments.model, questions, arguments.batch_size, arguments.rounds)
    write_json(arguments.results, {"machine": machine(), **results})
    print(f"{results['speedup']}x, {results['same_answers']} of {results['questions']} answers the same")


def compare(model: Path, questions: list[Question], batch_size: int, rounds: int) -> dict[str, Any]:
    """Median answers per second one by one and in batches, the median of their ratios, and how many are the same."""
    loaded = load_for_inference(model)
    seconds: dict[int, list[float]] = {ONE_BY_ONE: [], batch_size: []}
    texts: dict[int, list[str]] = {}
    for number in range(1 + rounds):
        for size, taken in seconds.items():
            started = time.perf_counter()
            batches = answer(loaded, questions, CONVERSATION, size, LONGEST_ANSWER, progress=False)
            texts[size] = [text for _, answers in batches for text in answers]
            if number > 0:
                taken.append(time.perf_counter() - started)
    alone, together = seconds.values()
    return {
        "questions": len(questions),
        "batch_size": batch_size,
        "rounds": rounds,
        "answers_per_second": {str(n): round(len(questions) / statistics.median(t), 2) for n, t in seconds.items()},
        "speedup": round(statistics.median(one / many for one, many in zip(alone, together)), 2),
        "same_answers": sum(one == many for one, many in zip(*texts.values())),
    }


if __name__ == "__main__":
    main()
