"""A base and a tower are found again, or asked for with the flag that names them."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.adapters.model_places import adapter_of, base_model_of, vision_tower_of

from ...tiny import message_of

pytestmark = pytest.mark.one_stack


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "project" / "output" / "adapter"
    (tmp_path / "project" / "models" / "base").mkdir(parents=True)
    MixLoraConfig(base_model_name_or_path=str(tmp_path / "project" / "models" / "base")).save_pretrained(folder)
    return folder


def name(folder, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))


def test_recorded_base_is_inferred(adapter, tmp_path):
    assert base_model_of(adapter) == str(tmp_path / "project" / "models" / "base")


def test_given_base_wins(adapter, tmp_path):
    name(adapter, "/no/such/base")
    assert base_model_of(adapter, str(tmp_path)) == str(tmp_path)


def test_hub_names_pass_unchecked(adapter):
    assert base_model_of(adapter, "lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"


def test_adapter_on_the_hub_is_read_where_it_has_been_downloaded_to(adapter, tmp_path):
    found = {}
    for repository, files in {"adapter": adapter, "model": adapter.parents[1] / "models"}.items():
        snapshot = tmp_path / f"models--owner--{repository}" / "snapshots" / (40 * "a")
        shutil.copytree(files, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(40 * "a")
        found[repository] = snapshot
    program = (
        "import sys; from llava_mixlora.adapters.model_places import adapter_of; print(*map(adapter_of, sys.argv[1:]))"
    )
    asked = [sys.executable, "-c", program, "owner/adapter", "owner/model", "owner/none"]
    done = subprocess.run(asked, env={**os.environ, "HF_HUB_CACHE": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.split() == [str(found["adapter"]), "owner/model", "owner/none"], done.stderr


def test_folder_of_an_adapter_is_no_hub_name(adapter, monkeypatch):
    monkeypatch.chdir(adapter.parents[1])
    assert adapter_of("output/adapter") == "output/adapter" and adapter_of("/no/such/folder") == "/no/such/folder"


@pytest.mark.parametrize("recorded", ["models/base", "./models/base"])
def test_relative_base_is_found_from_the_adapter_wherever_one_stands(adapter, tmp_path, monkeypatch, recorded):
    name(adapter, recorded)
    shutil.move(tmp_path / "project", tmp_path / "moved")
    monkeypatch.chdir("/")
    expected = tmp_path / "moved" / "models" / "base"
    assert base_model_of(tmp_path / "moved" / "output" / "adapter").replace("/./", "/") == str(expected)


def test_relative_base_is_found_from_here(adapter, tmp_path, monkeypatch):
    name(adapter, "there/base")
    (tmp_path / "work" / "there" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert base_model_of(adapter) == str(tmp_path / "work" / "there" / "base")


def test_what_lies_beside_the_adapter_comes_first(adapter, tmp_path, monkeypatch):
    name(adapter, "models/base")
    (tmp_path / "work" / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert base_model_of(adapter) == str(tmp_path / "project" / "models" / "base")


@pytest.mark.parametrize("recorded", [None, ""])
def test_no_recorded_base_asks_for_one(adapter, recorded):
    name(adapter, recorded)
    with pytest.raises(MixLoraError, match="names no base model; pass --model-base"):
        base_model_of(adapter)


@pytest.mark.parametrize("gone", ["/no/such/base", "./gone", "~/gone", "a/b/c", "gone", "output/base"])
def test_base_that_is_gone_is_one_line_with_its_origin_and_flag(adapter, gone):
    name(adapter, gone)
    message = message_of(base_model_of, adapter)
    assert message.startswith(f"{gone}: no such folder") and str(adapter) in message and "--model-base" in message


@pytest.mark.parametrize("gone", ["/no/such/base", "./gone", "gone"])
def test_given_base_that_is_gone_is_named_with_its_flag(adapter, gone):
    assert message_of(base_model_of, adapter, gone).startswith(f"--model-base {gone}: no such folder")


def test_tower_is_found_beside_the_base(adapter, tmp_path, monkeypatch):
    tower = tmp_path / "elsewhere" / "towers" / "clip"
    tower.mkdir(parents=True)
    (tmp_path / "elsewhere" / "base").mkdir()
    monkeypatch.chdir("/")
    assert vision_tower_of(adapter, "towers/clip", base=str(tmp_path / "elsewhere" / "base")) == str(tower)


def test_tower_that_is_gone_asks_for_its_flag(adapter, tmp_path):
    message = message_of(vision_tower_of, adapter, "/no/such/tower")
    assert "/no/such/tower" in message and "pass its place as --vision-tower" in message
    assert vision_tower_of(adapter, "/no/such/tower", str(tmp_path)) == str(tmp_path)
    assert "--vision-tower ./gone" in message_of(vision_tower_of, adapter, "/no/such/tower", "./gone")
