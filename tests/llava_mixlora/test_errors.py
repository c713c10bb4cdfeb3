"""What users are told is one line, whatever a stranger has written into what it quotes."""

import pickle

import pytest

from llava_mixlora import MixLoraError

pytestmark = pytest.mark.one_stack


@pytest.mark.parametrize("written", ["a\nb", "a\r\nb", "a\u2028b", "a\x85b", "a\x1b[2Jb", "a\0b", "a\ud800b"])
def test_message_is_one_line_that_can_be_printed(written):
    said = str(MixLoraError(f"{written}: no such folder"))
    assert said.isprintable() and said.startswith("a\\") and said.endswith("b: no such folder")


def test_message_stays_as_it_is_otherwise():
    error = MixLoraError("zwei é 😀 'a\\\\b': expected a name")
    assert str(error) == "zwei é 😀 'a\\\\b': expected a name" == str(pickle.loads(pickle.dumps(error)))
