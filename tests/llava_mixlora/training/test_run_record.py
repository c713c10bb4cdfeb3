"""What of a run's data goes into the record beside its adapter."""

from types import SimpleNamespace

import pytest

from llava_mixlora.training.run_record import _data


@pytest.mark.parametrize(
    "given, name",
    [("a/train.json", "train.json"), (["a/train.json", "b/more.json"], "train.json, more.json"), (None, None)],
)
def test_data_are_named_by_their_files(given, name):
    run = SimpleNamespace(flags={"data_path": given}, samples=8, data="0a")
    assert _data(run) == {"name": name, "samples": 8, "sha256": "0a"}
