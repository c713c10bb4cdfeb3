"""`playground.studies.study_report`: tables by method, steps and kind of question; pictures that can be drawn."""

from playground.studies.comparison import HELDOUT, VALIDATION
from playground.studies.study_report import draw, draw_curves, tables


def cell(setting, method, r, steps, mean, new=None, curve=None):
    asked = {part: {"mean": mean, "spread": 1.0, "by_task": {}} for part in (VALIDATION, HELDOUT)}
    asked |= {} if new is None else {"new wordings": {"mean": new, "spread": 0.5, "by_task": {}}}
    found = {"setting": setting, "method": method, "r": r, "steps": steps, "trained_parameters": 1000 * r}
    return {**found, "asked": asked, **({"curve": curve} if curve else {})}


CONTENTS = {
    "cells": [
        cell("books", "LoRA", 2, 300, 20.0, 10.0),
        cell("books", "LoRA", 16, 300, 30.0, 12.0),
        cell("books", "MixLoRA words", 4, 300, 90.0, 80.0),
        cell("books", "LoRA", 16, 1500, 60.0, 50.0, {"300": 25.0, "1500": 61.0}),
        cell("tasks", "LoRA", 4, 240, 85.0),
    ]
}


def test_a_table_has_a_row_for_each_method_and_a_column_for_steps_and_questions():
    assert tables(CONTENTS) == (
        "**books**\n\n"
        "| | trained parameters | 300 steps | 300 steps, new wordings | 1,500 steps | 1,500 steps, new wordings |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| LoRA, r=2 | 2,000 | 20.0 ± 1.0 | 10.0 ± 0.5 |  |  |\n"
        "| LoRA, r=16 | 16,000 | 30.0 ± 1.0 | 12.0 ± 0.5 | 60.0 ± 1.0 | 50.0 ± 0.5 |\n"
        "| MixLoRA words, r=4 | 4,000 | 90.0 ± 1.0 | 80.0 ± 0.5 |  |  |\n\n"
        "**tasks**\n\n"
        "| | trained parameters | 240 steps |\n"
        "| --- | --- | --- |\n"
        "| LoRA, r=4 | 4,000 | 85.0 ± 1.0 |"
    )


def test_both_pictures_are_drawn(tmp_path):
    for drawn, name in ((draw, "study.png"), (draw_curves, "study_curves.png")):
        drawn(CONTENTS, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_there_are_no_curves_without_long_runs(tmp_path):
    short = {"cells": CONTENTS["cells"][-1:]}
    draw(short, tmp_path / "study.png")
    draw_curves(short, tmp_path / "study_curves.png")
    assert [file.name for file in tmp_path.iterdir()] == ["study.png"]
