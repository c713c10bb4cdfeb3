"""`llava-mixlora patches`: what is changed in upstream programs, and whether it fits here."""

import json

import pytest
from llava_mixlora.patches import Patch

from llava_mixlora.cli import main
from llava_mixlora.diagnosis import patch_table


def test_table_tells_of_every_patch(patched, capsys):
    assert main(["patches"]) == 0
    shown = capsys.readouterr().out
    for patch in (*patched.PATCHES, *patched.OF_THE_METHOD):
        assert patch.target in shown and patch.why in shown and patch.kind in shown
    assert "DOES NOT FIT" not in shown


def test_programs_hold_the_same_for_other_programs(patched, capsys):
    assert main(["patches", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    every = (*patched.OF_THE_METHOD, *patched.PATCHES)
    named = [(row["target"], row["kind"], row["needed"]) for row in told]
    assert named == [(patch.target, patch.kind, patch.needed) for patch in every]
    assert all(row["fits"] is None for row, patch in zip(told, every) if patch.program or not patch.needed)
    assert all(row["fits"] for row, patch in zip(told, every) if patch.needed and not patch.program)
    assert "all" in {row["versions"] for row in told}


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_patch_that_does_not_fit_is_named_with_the_reason_and_status_one(monkeypatch, capsys, as_json):
    gone = Patch("llava_mixlora:gone", kind="method", why="the test says so", replace=lambda original: original)
    monkeypatch.setattr(patch_table, "PATCHES", (gone,))
    assert main(["patches", *as_json]) == 1
    shown = capsys.readouterr().out
    assert "cannot patch llava_mixlora:gone: expected it to exist" in shown
    assert as_json or "DOES NOT FIT" in shown
