"""`playground.studies.study`: its cells, how it chooses learning rates, and what it writes where."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from playground.notes import Notes
from playground.studies import comparison
from playground.studies.comparison import (
    FIRST_RATE,
    HELDOUT,
    RATES,
    VALIDATION,
    Cell,
    Run,
    best_rate,
    contents,
    rates_to_try,
)
from playground.studies.eleven_tasks import ELEVEN_TASKS, OF_THE_OTHER_PART
from playground.studies.interference import FIXED_8, FIXED_32, NEW, PARAPHRASED_8, PARAPHRASED_32
from playground.studies.methods import METHODS
from playground.studies.study import SEEDS, cells, choose_places, settings_of

LABELS = "MixLoRA words, task labels, r=4"
CELL = Cell(FIXED_8, "MixLoRA words, r=4", 300)
SEED = SEEDS[0]


def test_study_has_the_cells_that_it_promises():
    assert len({cell.name for cell in cells()}) == len(cells()) and len(SEEDS) >= 3
    by_setting = {setting: [cell for cell in cells() if cell.setting == setting] for setting in settings()}
    first = {name: {cell.method for cell in of if cell.steps == cell.setting.steps} for name, of in by_setting.items()}
    long = {name: {cell.method for cell in of if cell.steps == 1500} for name, of in by_setting.items()}
    assert first[ELEVEN_TASKS] == {*METHODS} - {*OF_THE_OTHER_PART} and first[FIXED_8] > {*OF_THE_OTHER_PART}
    for setting in (FIXED_8, PARAPHRASED_8, FIXED_32, PARAPHRASED_32):
        assert long[setting] <= first[setting]
        assert {"one LoRA per task, r=4", "LoRA, r=32", "oracle routes, r=4"} <= first[setting]
    assert {"LoRA, r=16", "MixLoRA words, r=4"} <= long[FIXED_8] and {"LoRA, r=16", LABELS} <= long[PARAPHRASED_8]
    assert {"Poly, r=4", "X-LoRA, r=4", "Arrow, r=4"} <= first[FIXED_8]
    assert [cell.method for cell in cells() if cell.steps == 3000] == ["LoRA, r=16"]
    assert {cell.method for cell in cells()} == set(METHODS)


def settings():
    return list(dict.fromkeys(cell.setting for cell in cells()))


def test_short_form_is_a_part_of_the_whole():
    assert set(cells(short=True)) < set(cells())
    assert {cell.steps for cell in cells(short=True)} == {240, 300}


def test_trial_has_the_same_cells_with_a_few_steps():
    tried = cells(trial=True)
    assert [(cell.setting.name, cell.method) for cell in tried] == [
        (cell.setting.name, cell.method) for cell in cells()
    ]
    assert {cell.steps for cell in tried} == {2, 10, 20} and len({cell.name for cell in tried}) == len(tried)


def test_every_cell_is_tuned_alike_but_for_what_takes_the_rates_of_others():
    for cell in cells():
        own = cell.tuned_as
        assert own.steps == own.setting.steps and own.tuned_as == own
        assert own.method == ("one LoRA per task, r=4" if cell.method == "Arrow, r=4" else cell.method)
    assert Cell(FIXED_32, "LoRA, r=16", 1500).tuned_as == Cell(FIXED_8, "LoRA, r=16", 300)
    assert Cell(PARAPHRASED_32, "LoRA, r=16", 300).tuned_as == Cell(PARAPHRASED_8, "LoRA, r=16", 300)


def search(accuracy_at):
    """The learning rate that the search ends with, and those that it tried."""
    taken = {}
    while tries := rates_to_try(CELL, taken, SEED):
        for rate in tries:
            taken[Run(CELL, rate, SEED).name] = {"asked": {VALIDATION: {"a": accuracy_at(rate)}}}
        assert len(taken) <= len(RATES)
    return best_rate(CELL, taken, SEED), len(taken)


@pytest.mark.parametrize("best", RATES)
def test_search_finds_the_best_learning_rate_where_there_is_one_peak(best):
    found, _ = search(lambda rate: 50 - 10 * abs(RATES.index(rate) - RATES.index(best)))
    assert found == best


def test_search_stops_when_both_neighbours_are_worse():
    place = RATES.index(FIRST_RATE)
    assert search(lambda rate: 50 - abs(RATES.index(rate) - place)) == (FIRST_RATE, 3)


@given(st.lists(st.floats(0, 100), min_size=len(RATES), max_size=len(RATES)))
def test_search_ends_at_a_local_best_whatever_the_accuracies(accuracies):
    found, _ = search(lambda rate: accuracies[RATES.index(rate)])
    place = RATES.index(found)
    rounded = [round(value, 2) for value in accuracies]
    assert rounded[place] >= max(rounded[max(0, place - 1) : place + 2])


def measured(first, second, new=None):
    asked = {VALIDATION: {"a": first, "b": second}, HELDOUT: {"a": first, "b": second}}
    asked |= {} if new is None else {NEW: {"a": new, "b": new}}
    return {"asked": asked, "trained_parameters": 12, "seconds": 1.0, "curve": {"75": first, "150": second}}


def test_contents_tell_rates_seeds_means_and_spreads_of_a_cell():
    long = Cell(PARAPHRASED_32, "LoRA, r=16", 1500)
    taken = {Run(long.tuned_as, rate, 0).name: measured(rate * 1e4, rate * 1e4) for rate in RATES[1:3]}
    taken |= {Run(long, RATES[2], seed).name: measured(10.0 * seed, 10.0 * seed + 2, 50.0) for seed in (0, 1, 2)}
    found = contents(long, RATES[2], (0, 1, 2), taken)
    assert (found["setting"], found["method"], found["r"], found["steps"]) == (long.setting.name, "LoRA", 16, 1500)
    assert (
        found["learning_rate"] == RATES[2] and found["tuned_as"] == "8 code books, paraphrased: LoRA, r=16, 300 steps"
    )
    assert found["validation_by_rate"] == {"0.00025": 2.5, "0.0005": 5.0}
    assert found["asked"][HELDOUT] == {"mean": 11.0, "spread": 10.0, "by_task": {"a": 10.0, "b": 12.0}}
    assert found["asked"][NEW]["mean"] == 50 and found["curve"] == {"75": 10.0, "150": 12.0}
    assert list(found["seeds"]) == ["0", "1", "2"] and found["seeds"]["1"] == taken[Run(long, RATES[2], 1).name]


class Memory:
    """Notes without a file, and a pool that trains at once, in this process."""

    def __init__(self):
        self.taken = {}

    def has(self, name):
        return name in self.taken

    def add(self, name, found):
        assert name not in self.taken
        self.taken[name] = json.loads(json.dumps(found))


def test_what_is_measured_is_not_measured_again(monkeypatch):
    notes, best = Memory(), 1e-3

    def measure(pool, cache, runs, notes, title):
        for run in [run for run in runs if not notes.has(run.name)]:
            notes.add(run.name, measured(90 - abs(run.rate - best) * 1e4, 80 + run.seed))

    class NoPool:
        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(comparison, "_measure", measure)
    monkeypatch.setattr(comparison, "_pool", lambda processes: NoPool())
    wanted = [CELL, Cell(FIXED_32, CELL.method, 1500), Cell(FIXED_8, "Arrow, r=4", 300)]
    found = comparison.compare(wanted, SEEDS, Path(), notes, 1)
    assert [cell["learning_rate"] for cell in found] == [best] * 3
    assert len(notes.taken) == 3 + 2 + 3 + 3 + 3  # rates and further seeds; a long one; rates of one per task; Arrow
    before = dict(notes.taken)
    assert comparison.compare(wanted, SEEDS, Path(), notes, 1) == found and notes.taken == before


@pytest.mark.parametrize("form", [{}, {"short": True}, {"trial": True}])
def test_notes_of_an_interrupted_study_are_found_again(tmp_path, form):
    Notes(tmp_path / "notes.json", {"settings": settings_of(cells(**form))}).add("a run", 1)
    assert Notes(tmp_path / "notes.json", {"settings": settings_of(cells(**form))}).has("a run")


def places(**options):
    given = {"trial": False, "short": False, "only": "", "cache": None, "notes": None, "results": None}
    arguments = Namespace(**{**given, **options})
    choose_places(arguments)
    return arguments.cache, arguments.notes, arguments.results


def test_part_of_the_study_leaves_the_results_of_the_whole_alone():
    cache, notes, results = places()
    assert results.name == "results"
    assert places(only="LoRA")[:2] == (cache, notes) and places(only="LoRA")[2] != results
    assert places(short=True)[0] == cache and not {*places(short=True)[1:]} & {notes, results}
    assert not {*places(trial=True)} & {cache, notes, results}
    assert places(trial=True, results="asked for")[2] == "asked for"
