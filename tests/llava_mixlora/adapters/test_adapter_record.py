"""A record says again what it was told."""

import json

import pytest

from llava_mixlora.adapters.adapter_record import (
    RECORD,
    AdapterRecord,
    KnownModel,
    MergedAdapter,
    known_model,
    read_record,
)
from llava_mixlora.adapters.fingerprints import Fingerprint

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

FULL = AdapterRecord(
    conversation="v1",
    base=KnownModel("/models/base", True, None, Fingerprint({"hidden_size": 8}, "abc", {"tokenizer.json": "def"})),
    vision_tower=KnownModel("openai/clip", False, "0123", Fingerprint({}, None, None, {"size": 336})),
    images={"image_aspect_ratio": "pad"},
    data={"name": "mix.json", "samples": 3, "sha256": "fed"},
    merged=(MergedAdapter("/output/adapter", "123"),),
)


def change(folder, **fields):
    file = folder / RECORD
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("record", [FULL, AdapterRecord()], ids=["full", "empty"])
def test_record_is_read_as_it_was_written(tmp_path, record):
    record.save(tmp_path)
    assert read_record(tmp_path) == record


def test_folder_without_a_record_has_none(tmp_path):
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "gone") is None
    assert read_record("owner/name") is None  # not downloaded, and no network in tests


def test_fields_of_another_version_are_passed_over(tmp_path):
    FULL.save(tmp_path)
    change(tmp_path, version="99.0", colour="blue")
    assert read_record(tmp_path).version == "99.0"


def test_format_of_a_newer_version_is_refused_with_both_versions(tmp_path):
    FULL.save(tmp_path)
    change(tmp_path, format=99, version="99.0")
    message = message_of(read_record, tmp_path)
    assert "format=99" in message and "99.0" in message and FULL.version in message


@pytest.mark.parametrize(
    "fields",
    [
        {"conversation": "v1\nv2"},
        {"conversation": 5000 * "v"},
        {"conversation": 3},
        {"base": "x"},
        {"base": {}},
        {"base": {"is_folder": True, "fingerprint": None}},
        {"merged": 7},
        {"merged": ["x"]},
        {"data": 3},
        {"data": {"name": "a\nb"}},
        {"data": {"samples": "3"}},
        {"format": "1"},
    ],
    ids=str,
)
def test_damaged_record_is_one_line(tmp_path, fields):
    FULL.save(tmp_path)
    change(tmp_path, **fields)
    assert str(tmp_path / RECORD) in message_of(read_record, tmp_path)


def test_base_in_the_cache_of_the_hub_is_recorded_with_its_commit(tmp_path):
    # As the hub's cache lays a repository out.
    repository = tmp_path / "models--owner--llava"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    (snapshot / "config.json").write_text(json.dumps({"hidden_size": 8}))
    known = known_model("owner/llava", str(tmp_path))
    assert known == KnownModel("owner/llava", False, "0123abcd", Fingerprint({"hidden_size": 8}))
    assert str(known) == "owner/llava at revision 0123abcd"


def test_folder_is_recorded_so_that_it_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    known = known_model("base")
    assert (known.name_or_path, known.is_folder) == (str(tmp_path / "base"), True)


def test_record_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "adapter").mkdir()
    FULL.save(tmp_path)
    (tmp_path / "adapter" / RECORD).symlink_to("../" + RECORD)
    assert "outside of its folder" in message_of(read_record, tmp_path / "adapter")
