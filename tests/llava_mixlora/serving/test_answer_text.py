"""Answers as their tokens come: what is told is certain, and together it is the answer."""

import pytest

from llava_mixlora.serving.answer_text import AnswerText

pytestmark = pytest.mark.one_stack
WORDS = {1: " red", 2: " square", 3: " STO", 4: "P here", 5: "\n", 6: "é".encode()[:1], 7: "é".encode()[1:]}


def decode(tokens):
    words = (WORDS[token] for token in tokens)
    return b"".join(word if isinstance(word, bytes) else word.encode() for word in words).decode(errors="replace")


def told(tokens, stops=(), bytes_=()):
    text = AnswerText(decode, stops, bytes_)
    parts = []
    for token in tokens:
        parts.append(text.add(token))
        if text.stopped:
            break
    return [*parts, text.end()], text


def test_parts_are_the_answer_without_blanks_around_it():
    parts, _ = told([5, 1, 5, 2, 5])
    assert parts == ["", "red", "", "\n square", "", ""] and "".join(parts) == decode([5, 1, 5, 2, 5]).strip()


def test_letter_of_two_tokens_is_told_when_it_is_whole():
    parts, _ = told([1, 6, 7])
    assert parts == ["red", "", "é", ""]


def test_run_of_bytes_waits_for_its_end():
    # As sentencepiece does it, bytes that make no letter take those before them along.
    parts, _ = told([1, 5, 6, 7, 2], bytes_={5, 6, 7})
    assert parts == ["red", "", "", "", "\né square", ""]


def test_letter_that_stays_unfinished_is_told_at_the_end():
    parts, _ = told([1, 6])
    assert parts == ["red", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    "stop, expected", [("STOP", "red"), ("square", ""), ("e", "r"), ("none such", "red STOP here")]
)
def test_stop_ends_the_answer_and_is_no_part_of_it(stop, expected):
    tokens = [2, 1] if stop == "square" else [1, 3, 4]
    parts, text = told(tokens, [stop])
    assert "".join(parts) == expected and text.stopped == (stop != "none such")


def test_what_a_stop_may_begin_with_waits():
    parts, text = told([1, 3, 2], ["STOP"])
    assert parts == ["red", "", " STO square", ""] and not text.stopped


def test_first_of_several_stops_counts():
    parts, _ = told([1, 2, 3, 4], ["here", "STO"])
    assert "".join(parts) == "red square"
