"""What merging costs in accuracy: the embedded default's held-out questions, asked of static stand-ins for its adapter.

    python -m playground.studies.merge_study            # after scripts/finetune_mixlora.sh has trained the adapter

Asks the dynamic model, its merges by every method, a merge for each task (asked that task's questions), and the plain
LoRA of rank E that the main job has trained beside it. Merges are calibrated on training questions. Writes
`playground/results/merge.json`, and prints the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llava_mixlora import MixLoraError
from llava_mixlora.inference.samples import SampleSource
from llava_mixlora.merging.fidelity import Fidelity
from llava_mixlora.merging.merge import static_updates, write_merged
from llava_mixlora.merging.static_adapter import SavedAdapter
from playground import PLAYGROUND
from playground.atomic import write_json
from playground.data.main_job import HELDOUT, TRAIN
from playground.embedded_default import IMAGES, QUESTIONS, lora_beside
from playground.notes import Notes

METHODS = ("mean", "lstsq", "regression")
TASK_METHOD = "lstsq"


def main() -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args()
    try:
        results = study(arguments)
    except MixLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.results, results)
    print("\n" + table(results))
    print(f"\nwritten to {arguments.results}")
    return 0


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracies in percent by variant and task, and how far the merges are from the dynamic model.

    What is measured is noted in the output folder at once, so an interrupted study goes on.
    """
    from llava_mixlora.adapters.adapter_folder import read_config
    from playground.answers import read_questions

    base, data, adapter = arguments.cache / "llava-v1-tiny", arguments.cache / "data", arguments.adapter
    lora = lora_beside(adapter)
    questions = read_questions(arguments.cache / QUESTIONS / HELDOUT, arguments.questions)
    rank = read_config(adapter).num_factors
    settings = {"questions": len(questions), "calibration_samples": arguments.samples, "task_method": TASK_METHOD}
    notes = Notes(adapter.parent / "merge_study.json", {**settings, "adapter": str(adapter.absolute())})

    def accuracy(folder: Path, asked: list[dict[str, Any]] = questions) -> dict[str, float]:
        return _accuracy(folder, base if folder in (adapter, lora) else None, asked, data)

    notes.take("dynamic", lambda: accuracy(adapter))
    if not notes.has(*METHODS, "fidelity"):
        with _merged(adapter, base, "regression", _calibration(arguments)) as (folders, fidelity):
            for method in METHODS:
                notes.take(method, partial(accuracy, folders[method]))
            notes.take("fidelity", lambda: _summary(fidelity))
    tasks = dict.fromkeys(question["task"] for question in questions)
    for task in tasks:
        if not notes.has(f"task {task}"):
            of_task = [question for question in questions if question["task"] == task]
            with _merged(adapter, base, TASK_METHOD, _calibration(arguments, task)) as (folders, _):
                notes.take(f"task {task}", partial(accuracy, folders[TASK_METHOD], of_task))
    notes.take("lora", lambda: accuracy(lora))
    found = notes.taken
    rows = {name: found[name] for name in ("dynamic", *METHODS)}
    rows["per task"] = {task: found[f"task {task}"][task] for task in tasks}
    rows[f"LoRA rank {rank}"] = found["lora"]
    return {
        **settings,
        "accuracy": {name: {task: round(value, 2) for task, value in row.items()} for name, row in rows.items()},
        "mean": {name: round(sum(row.values()) / len(row), 2) for name, row in rows.items()},
        "fidelity": found["fidelity"],
    }


def table(results: dict[str, Any]) -> str:
    """The accuracies as a Markdown table."""
    names = list(results["accuracy"])
    lines = ["| task | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for task in results["accuracy"]["dynamic"]:
        lines.append(f"| {task} | " + " | ".join(f"{results['accuracy'][n][task]:.1f}%" for n in names) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{results['mean'][name]:.1f}%**" for name in names) + " |")
    return "\n".join(lines)


def _calibration(arguments: argparse.Namespace, task: str | None = None) -> SampleSource:
    data, images = arguments.cache / QUESTIONS / TRAIN, arguments.cache / "data" / IMAGES
    return SampleSource(str(data), str(images), task, arguments.samples, "llava_v1", batch_size=32)


@contextmanager
def _merged(
    adapter: Path, base: Path, method: str, calibration: SampleSource
) -> Iterator[tuple[dict[str, Path], Fidelity]]:
    """A merged checkpoint for each method that comes with `method`, as long as the context lasts."""
    saved = SavedAdapter(adapter)
    updates, fidelity = static_updates(saved, base, method, calibration)
    with tempfile.TemporaryDirectory() as place:
        folders = {method: Path(place) / method for method in updates}
        for method, folder in folders.items():
            folder.mkdir()
            write_merged(saved, base, updates[method], folder)
        yield folders, fidelity


def _summary(fidelity: Fidelity) -> dict[str, dict[str, float]]:
    layers = fidelity.heldout.values()
    return {
        method: {
            "mean_relative_error_heldout": round(sum(row[method] for row in layers) / len(layers), 4),
            "kl": round(found.kl, 5),
            "same_token": round(found.same_token, 4),
            "held_out_tokens": found.tokens,
        }
        for method, found in fidelity.agreement.items()
    }


def _accuracy(folder: Path, base: Path | None, questions: list[dict[str, Any]], data: Path) -> dict[str, float]:
    from llava_mixlora import patches

    patches.apply()
    from llava.model.builder import load_pretrained_model

    from playground.answers import answer
    from playground.report import accuracy_by_task

    name = "llava-v1-lora" if base is not None else "llava-v1"
    loaded = load_pretrained_model(str(folder), base and str(base), name, device_map="cpu", device="cpu")
    tokenizer, model, image_processor, _ = loaded
    texts = answer((tokenizer, model.float(), image_processor), questions, data / IMAGES).texts
    return accuracy_by_task(questions, texts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m playground.studies.merge_study", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--adapter", type=Path, default=PLAYGROUND / "output" / "llava-v1-tiny-mixlora", help="adapter folder"
    )
    parser.add_argument(
        "--cache", type=Path, default=PLAYGROUND / "cache", help="data and base model (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=PLAYGROUND / "results" / "merge.json", help="file to write")
    parser.add_argument("--samples", type=int, default=1000, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--questions", type=int, help="at most so many of each task")
    return parser


if __name__ == "__main__":
    sys.exit(main())
