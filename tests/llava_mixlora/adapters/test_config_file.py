"""A model's `config.json`, wherever it lies."""

import json

import huggingface_hub.constants
import pytest

from llava_mixlora.adapters.config_file import absolute, config_file, config_of

from ...tiny import message_of

pytestmark = pytest.mark.one_stack


def test_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert config_of(str(tmp_path)) == {"hidden_size": 8}
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in message_of(config_of, str(tmp_path))


@pytest.mark.parametrize("name", [None, "", "/gone/model", "./gone", "gone/for/ever"])
def test_what_is_not_there_is_not_known(name):
    assert config_of(name) is None


def test_folder_without_a_configuration_is_not_known(tmp_path):
    assert config_file(str(tmp_path)) is None


def test_hub_name_is_read_from_the_cache_without_a_network(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--llava"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps({"hidden_size": 8}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert config_of("owner/llava", str(tmp_path)) == {"hidden_size": 8}
    assert config_file("owner/llava", str(tmp_path)).parent.name == commit


def test_hub_name_that_cannot_be_had_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert config_of("owner/llava", str(tmp_path)) is None


def test_folder_has_a_name_for_every_working_directory(tmp_path, monkeypatch):
    (tmp_path / "tower").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute("tower") == absolute("./tower") == str(tmp_path / "tower")
    assert absolute("openai/clip-vit-large-patch14-336") == "openai/clip-vit-large-patch14-336"
