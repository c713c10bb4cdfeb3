"""Files of a folder: regular, and no links that lead out of it."""

import os

import pytest

from llava_mixlora.own_files import copy_own, own_file

from ..tiny import message_of

pytestmark = pytest.mark.one_stack


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "real").write_text("own")
    return tmp_path / "adapter"


def hub_snapshot(cache, repository="models--owner--name"):
    """A snapshot as the hub's cache lays it out: links into the repository's blobs."""
    snapshot = cache / repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / repository / "blobs").mkdir()
    return snapshot


def test_regular_file_and_link_inside_are_the_folders_own(folder):
    (folder / "link").symlink_to("real")
    assert own_file(folder, "real").read_text() == own_file(folder, "link").read_text() == "own"
    assert own_file(folder, "missing") is None


def test_linked_folder_is_a_folder(folder, tmp_path):
    (tmp_path / "newest").symlink_to("adapter")
    assert own_file(tmp_path / "newest", "real").read_text() == "own"


@pytest.mark.parametrize("target", ["../secret", "{}/secret", "/etc/hostname", "/dev/zero"])
def test_link_out_of_the_folder_is_refused(folder, tmp_path, target):
    (folder / "link").symlink_to(target.format(tmp_path))
    said = message_of(copy_own, folder, "link", tmp_path)
    assert f"{folder / 'link'} is a link to /" in said and not (tmp_path / "link").exists()


def test_file_behind_a_linked_folder_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (folder / "inner").symlink_to("../elsewhere")
    assert "outside of its folder" in message_of(own_file, folder, "inner/file")


@pytest.mark.parametrize("target", ["nothing", "link"])
def test_link_to_nothing_is_refused(folder, target):
    (folder / "link").symlink_to(target)
    assert str(folder / "link") in message_of(own_file, folder, "link")


def test_pipe_and_folder_are_no_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "inner").mkdir()
    for name in ("pipe", "inner"):
        assert "is no regular file" in message_of(own_file, folder, name)


def test_snapshot_in_the_cache_of_the_hub_is_read_and_copied(tmp_path):
    snapshot = hub_snapshot(tmp_path)
    (snapshot.parents[1] / "blobs" / "f00").write_text("blob")
    (snapshot / "checkpoint-1").mkdir()
    (snapshot / "file").symlink_to("../../blobs/f00")
    (snapshot / "checkpoint-1" / "file").symlink_to("../../../blobs/f00")
    (tmp_path / "out").mkdir()
    assert copy_own(snapshot, "file", tmp_path / "out") and not (tmp_path / "out" / "file").is_symlink()
    assert own_file(snapshot / "checkpoint-1", "file").read_text() == "blob"


def test_blob_of_another_repository_is_not_its_own(tmp_path):
    snapshot, other = hub_snapshot(tmp_path), hub_snapshot(tmp_path, "models--owner--private")
    (other.parents[1] / "blobs" / "f00").write_text("private")
    (snapshot / "file").symlink_to("../../../models--owner--private/blobs/f00")
    assert "outside of its folder" in message_of(own_file, snapshot, "file")
