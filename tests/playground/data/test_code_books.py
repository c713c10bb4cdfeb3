"""`playground.data.code_books`: books that contradict each other, questions that only the key word tells apart."""

import json
import string
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from playground.data.code_books import KEYS, NEW_WORDINGS, WORDINGS, code_books, digit_pictures, questions
from playground.data.tasks import WORDS

PICTURES = [{"image": f"{n}.png", "split": "train", "digit": n % 10} for n in range(40)]


def words_of(text):
    return text.format(key="").translate(str.maketrans("", "", string.punctuation)).split()


def turns(sample):
    return [turn["value"] for turn in sample["conversations"]]


def test_books_are_permutations_that_contradict_each_other():
    books = code_books(len(KEYS))
    assert len(books) == len(set(books.values())) == 32
    assert all(sorted(words) == sorted(WORDS) for words in books.values())
    agreeing = [sum(map(str.__eq__, one, other)) for one, other in combinations(books.values(), 2)]
    assert sum(agreeing) / len(agreeing) == pytest.approx(1, abs=0.2) and max(agreeing) <= 5


@given(st.integers(1, len(KEYS)))
def test_fewer_books_are_the_first_ones(count):
    assert list(code_books(count).items()) == list(code_books(len(KEYS)).items())[:count]


@pytest.mark.parametrize("count", [0, len(KEYS) + 1])
def test_a_number_of_books_without_key_words_is_refused(count):
    with pytest.raises(ValueError, match=f"count={count}: expected 1 to 32"):
        code_books(count)


def test_one_answer_without_the_key_word_is_right_in_few_of_eight_books():
    books = code_books(8).values()
    best = [max(Counter(words[digit] for words in books).values()) for digit in range(10)]
    assert 0.2 <= sum(best) / (8 * 10) <= 0.3


def test_key_words_occur_in_no_wording_and_no_answer():
    used = {word for wording in (*WORDINGS, *NEW_WORDINGS) for word in words_of(wording)} | set(WORDS)
    assert not used & set(KEYS) and len(set(KEYS)) == len(KEYS)
    assert not set(WORDINGS) & set(NEW_WORDINGS) and all(w.count("{key}") == 1 for w in (*WORDINGS, *NEW_WORDINGS))


def test_key_words_follow_a_space_which_is_part_of_their_token():
    assert all(" {key}" in wording for wording in (*WORDINGS, *NEW_WORDINGS))


def test_each_book_asks_about_each_picture_and_answers_by_its_permutation():
    books = code_books(3)
    made = questions(PICTURES, books, WORDINGS[:1])
    assert Counter(sample["task"] for sample in made) == dict.fromkeys(books, len(PICTURES))
    digits = {picture["image"]: picture["digit"] for picture in PICTURES}
    for sample in made:
        question, answer = turns(sample)
        assert question == "<image>\n" + WORDINGS[0].format(key=sample["task"])
        assert answer == books[sample["task"]][digits[sample["image"]]]
    assert len({sample["id"] for sample in made}) == len(made)


def test_several_wordings_all_occur_and_say_nothing_of_the_book():
    made = questions(PICTURES, code_books(8), WORDINGS)
    for task in code_books(8):
        wordings = {turns(sample)[0].replace(task, "{key}") for sample in made if sample["task"] == task}
        assert wordings == {f"<image>\n{wording}" for wording in WORDINGS}
    assert made == questions(PICTURES, code_books(8), WORDINGS) != questions(PICTURES, code_books(8), WORDINGS, seed=1)


def test_asked_digits_are_as_many_of_each():
    made = questions(PICTURES, code_books(2), NEW_WORDINGS, per_book=25)
    digits = {picture["image"]: picture["digit"] for picture in PICTURES}
    for task in code_books(2):
        asked = [sample["image"] for sample in made if sample["task"] == task]
        counts = Counter(digits[image] for image in asked)
        assert len(set(asked)) == 25 and set(counts.values()) == {2, 3}
    with pytest.raises(ValueError, match="per_book=41: there are only 40 pictures"):
        questions(PICTURES, code_books(2), WORDINGS, per_book=41)


def test_pictures_of_shapes_are_left_out(tmp_path):
    shapes = [{"image": "shape.png", "split": "train", "shape": "circle", "color": "red"}]
    heldout = [{"image": "x.png", "split": "heldout", "digit": 3}]
    (tmp_path / "images.json").write_text(json.dumps(PICTURES + shapes + heldout))
    assert digit_pictures(tmp_path, "train") == PICTURES and digit_pictures(tmp_path, "heldout") == heldout
