"""Pickled files are read without running them, and code in them is named."""

import argparse
import os
import pickle
import zipfile

import numpy
import pytest
import torch

from llava_mixlora.adapters.pickles import read_pickle, read_state_dict, refuse_code

from ...tiny import message_of

pytestmark = pytest.mark.one_stack


class Code:
    """Runs when it is unpickled; `executed` tells whether it was."""

    executed = False

    def __reduce__(self):
        return setattr, (Code, "executed", True)


class Shell:
    def __reduce__(self):
        return os.system, ("true",)


def as_zip(content, file):
    torch.save(content, file)


def as_before_zip(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


def as_plain_pickle(content, file):
    file.write_bytes(pickle.dumps(content, protocol=4))


FORMS = [as_zip, as_before_zip]


@pytest.mark.parametrize("write", FORMS)
def test_tensors_are_read(tmp_path, write):
    write({"a": torch.ones(2)}, tmp_path / "file.bin")
    assert torch.equal(read_state_dict(tmp_path / "file.bin")["a"], torch.ones(2))
    refuse_code(tmp_path / "file.bin")


@pytest.mark.parametrize("write", [*FORMS, as_plain_pickle])
@pytest.mark.parametrize(("code", "name"), [(Shell(), "posix.system"), (Code(), ".setattr")])
def test_code_is_named_and_not_executed(tmp_path, write, code, name):
    write({"a": 1, "b": code}, tmp_path / "file.bin")
    for read in (read_pickle, refuse_code):
        said = message_of(read, tmp_path / "file.bin")
        assert "file.bin holds code ('" in said and f"{name}'), which was not executed" in said
        assert "copy it again" not in said
    assert not Code.executed


def test_states_of_training_hold_no_code(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    states = {"python": (3, (1, 2), None), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    for content in (optimizer.state_dict(), scheduler.state_dict(), states, argparse.Namespace(a=1)):
        as_zip(content, tmp_path / "file.bin")
        refuse_code(tmp_path / "file.bin")


def test_pickle_with_a_zip_file_behind_it_is_the_pickle(tmp_path):
    as_zip({}, tmp_path / "harmless")
    as_plain_pickle(Shell(), tmp_path / "file.bin")
    with (tmp_path / "file.bin").open("ab") as file:
        file.write((tmp_path / "harmless").read_bytes())
    assert "posix.system" in message_of(refuse_code, tmp_path / "file.bin")


def test_name_that_is_put_together_while_reading_is_code(tmp_path):
    # As with a name that comes from the memo: what it is shows only when the pickle runs.
    stream = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x04true\x94h\x00h\x01\x93h\x02\x85R."
    (tmp_path / "file.bin").write_bytes(stream)
    assert "holds code" in message_of(refuse_code, tmp_path / "file.bin")


def test_two_files_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.bin", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for content in (Shell(), {}):
            archive.writestr("archive/data.pkl", pickle.dumps(content))
    assert "two files of one name" in message_of(refuse_code, tmp_path / "file.bin")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"\0" * 99, b"\x80\x02}q\x00."])
def test_damaged_file_is_called_so(tmp_path, content):
    (tmp_path / "file.bin").write_bytes(content)
    for read in (read_pickle, refuse_code):
        assert "file.bin is damaged" in message_of(read, tmp_path / "file.bin")


def test_damaged_numbers_are_noticed(tmp_path):
    as_zip({"a": torch.ones(1000)}, tmp_path / "file.bin")
    content = bytearray((tmp_path / "file.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "file.bin").write_bytes(bytes(content))
    assert "is damaged" in message_of(read_pickle, tmp_path / "file.bin", verify=True)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, torch.ones(1)])
def test_other_contents_are_no_state_dict(tmp_path, content):
    as_zip(content, tmp_path / "file.bin")
    assert "expected a state dict of tensors by name" in message_of(read_state_dict, tmp_path / "file.bin")
