"""Samples drawn from tasks alike."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llava_mixlora.data.drawing import drawn_evenly

SIZES = st.dictionaries(st.sampled_from(["shape", "color", "digit", 3, None]), st.integers(1, 9), min_size=1)


def samples_of(sizes):
    named = [(task, number) for task, size in sizes.items() for number in range(size)]
    return [{"id": f"{task}-{n}", **({} if task is None else {"task": task})} for task, n in named]


@given(SIZES, st.integers(0, 40), st.integers(0, 5))
def test_every_beginning_has_as_many_of_each_task_as_there_are(sizes, count, seed):
    samples = samples_of(sizes)
    drawn = drawn_evenly(samples, count, seed)
    assert len(drawn) == min(count, len(samples)) == len({sample["id"] for sample in drawn})
    for end in range(len(drawn) + 1):
        counts = Counter(sample.get("task") for sample in drawn[:end])
        most = max(counts.values(), default=0)
        assert all(counts[task] >= min(size, most - 1) for task, size in sizes.items())


def test_the_seed_decides_which():
    samples = samples_of({"shape": 9, None: 9})
    assert drawn_evenly(samples, 6, seed=1) == drawn_evenly(samples, 6, seed=1)
    assert drawn_evenly(samples, 6, seed=1) != drawn_evenly(samples, 6, seed=2)
