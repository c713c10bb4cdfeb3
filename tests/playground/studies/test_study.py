"""`playground.studies.study`: its cells, and how it chooses learning rates."""

from argparse import Namespace
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from playground.studies.study import RATES, SEEDS, SINGLE, Cell, Run, best_rate, cells, choose_places, rates_to_try

CELL = Cell("MixLoRA", 4, "ifs_cfs", "none", "prompt")


def test_study_has_the_cells_that_it_promises():
    assert Counter(cell.method for cell in cells()) == {SINGLE: 1, "LoRA": 4, "MixLoRA": 27}
    assert len({cell.name for cell in cells()}) == len(cells()) == 32
    for cell in cells():
        config = cell.config()
        assert config.r == cell.r
        if cell.method == "MixLoRA":
            wanted = [cell.routing, cell.router_gradient or "straight_through", cell.router_scope or "prompt"]
            assert [config.routing, config.router_gradient, config.router_scope] == wanted


def test_every_cell_is_tuned_except_for_what_its_routers_average():
    tuned = {cell.tuned_as for cell in cells()}
    assert len(tuned) == 20
    for cell in cells():
        own = cell.tuned_as
        assert (own.method, own.r, own.routing, own.router_gradient) == (
            cell.method,
            cell.r,
            cell.routing,
            cell.router_gradient,
        )


def search(accuracy_at):
    """The learning rate that the search ends with, and those that it tried."""
    taken = {}
    while tries := rates_to_try(CELL, taken):
        for rate in tries:
            taken[Run(CELL, rate, SEEDS[0]).name] = {"validation": {"a": accuracy_at(rate)}}
        assert len(taken) <= len(RATES)
    return best_rate(CELL, taken), len(taken)


@pytest.mark.parametrize("best", RATES)
def test_search_finds_the_best_learning_rate_where_there_is_one_peak(best):
    found, _ = search(lambda rate: 50 - 10 * abs(RATES.index(rate) - RATES.index(best)))
    assert found == best


def test_search_stops_when_both_neighbours_are_worse():
    middle = len(RATES) // 2
    assert search(lambda rate: 50 - abs(RATES.index(rate) - middle)) == (RATES[middle], 3)


@given(st.lists(st.floats(0, 100), min_size=len(RATES), max_size=len(RATES)))
def test_search_ends_at_a_local_best_whatever_the_accuracies(accuracies):
    found, _ = search(lambda rate: accuracies[RATES.index(rate)])
    place = RATES.index(found)
    rounded = [round(value, 2) for value in accuracies]
    assert rounded[place] >= max(rounded[max(0, place - 1) : place + 2])


def places(**options):
    given = Namespace(**{"trial": False, "only": "", "cache": None, "notes": None, "results": None, **options})
    choose_places(given)
    return given.cache, given.notes, given.results


def test_part_of_the_study_leaves_the_results_of_the_whole_alone():
    cache, notes, results = places()
    assert results.name == "results"
    assert places(only="LoRA")[:2] == (cache, notes) and places(only="LoRA")[2] != results
    assert not {*places(trial=True)} & {cache, notes, results}
    assert places(trial=True, results="asked for")[2] == "asked for"
