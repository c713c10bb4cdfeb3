"""What tells tasks apart, on vectors and instructions whose tasks are known."""

import pytest
import torch
from torch import nn

from llava_mixlora.analysis.separability import centred, separability, told_apart

CLUSTERS = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0]])


def clusters(noise, each=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(each)
    return centred(CLUSTERS[labels] + noise * torch.randn(3 * each, 3, generator=generator)), labels


def test_tasks_far_apart_are_told_and_noise_is_not():
    near, labels = clusters(noise=0.1)
    found = told_apart(near, labels, range(60))
    assert found.share == 1 and 0.9 < found.low < 1 and found.high == pytest.approx(1)
    assert found.chance == pytest.approx(1 / 3) and found.count == 60
    noise = centred(torch.randn(600, 8, generator=torch.Generator().manual_seed(0)))
    found = told_apart(noise, torch.arange(600) % 3, range(600))
    assert found.share == pytest.approx(1 / 3, abs=0.08)


def test_interval_widens_with_fewer_samples():
    def width(each):
        found = told_apart(*clusters(noise=3.0, each=each), range(3 * each))
        return found.high - found.low

    assert width(4) > 2 * width(60)


def test_equal_vectors_are_guessed():
    """All tasks asked in the same words: rounding must not decide."""
    vectors = torch.tensor([0.1, 0.7, 0.3]).expand(9, 3)
    found = told_apart(centred(vectors), torch.arange(3).repeat_interleave(3), range(9))
    assert found.share == pytest.approx(1 / 3)


def test_group_is_left_out_of_all_tasks():
    """Twelve pictures, each shown in three tasks: knowing the picture tells nothing about the task."""
    pictures = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    labels = torch.arange(3).repeat_interleave(12)
    found = told_apart(centred(pictures), labels, [str(number) for number in range(12)] * 3)
    assert found.share == pytest.approx(1 / 3) and found.count == 12


def test_task_in_one_group_does_not_count():
    vectors, labels = clusters(noise=0.1, each=4)
    groups = ["a"] * 4 + ["b", "b", "c", "c"] + ["d", "e", "f", "g"]
    found = told_apart(vectors, labels, groups)
    assert found.share == 1 and found.count == 6
    assert told_apart(vectors, labels, labels.tolist()) is None


class Words:
    """A tokenizer that knows whole words."""

    def __init__(self):
        self.known = {}

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        numbers = [self.known.setdefault(word, len(self.known)) for word in text.split()]
        return type("Tokens", (), {"input_ids": numbers})


def separable(asked, images=None):
    """`asked`: the questions of each task's samples, one string or several turns each."""
    torch.manual_seed(0)
    samples = {}
    for task, of_task in asked.items():
        for number, turns in enumerate(of_task):
            turns = [turns] if isinstance(turns, str) else turns
            conversation = [{"from": "human", "value": f"<image>\n{turns[0]}"}, {"from": "gpt", "value": "yes"}]
            conversation += [{"from": "human", "value": turn} for turn in turns[1:]]
            image = images(task, number) if images else f"{number}.png"
            samples.setdefault(task, []).append({"image": image, "conversations": conversation})
    names = [sample["image"] for of_task in samples.values() for sample in of_task]
    features = {name: torch.randn(6) for name in dict.fromkeys(names)}
    return separability(samples, Words(), nn.Embedding(50, 24), torch.stack([features[name] for name in names]))


def test_word_that_names_the_task_tells_it():
    found = separable({"red": ["what is red here"] * 6, "blue": ["what is blue here"] * 6})
    assert found.words.share == 1 and found.new_wordings is None
    assert found.likeness == pytest.approx(1) and found.wordings == 1 and found.shared_wordings == 0
    assert found.picture.share == pytest.approx(0.5)


def test_same_question_in_every_task_tells_nothing():
    found = separable({"red": ["what is here"] * 6, "blue": ["what is here"] * 6})
    assert found.words.share == pytest.approx(0.5) and found.shared_wordings == 1


def test_paraphrases_are_told_but_unlike():
    wordings = ("what is {} here", "say {}", "{} of the picture please", "and now the {} one")
    found = separable({key: [wording.format(key) for wording in wordings] * 3 for key in ("red", "blue", "green")})
    assert found.wordings == 4 and found.words.share > 0.8
    assert found.new_wordings.count == 12 and found.new_wordings.share <= found.words.share
    assert found.likeness < 0.6


def test_every_question_of_a_conversation_is_an_instruction():
    found = separable({"red": [("what is red", "and more red")] * 4, "blue": [("what is blue", "and more blue")] * 4})
    assert found.words.count == 16 and found.wordings == 2


def test_question_without_words_is_no_instruction():
    found = separable({"red": [""] * 4, "blue": [""] * 4})
    assert found.words is None and found.new_wordings is None and found.picture is not None


def test_pictures_of_one_task_alone_tell_it_only_where_they_look_alike():
    torch.manual_seed(0)
    samples = {
        task: [{"image": f"{task}{n}.png", "conversations": [{"from": "human", "value": "what"}]} for n in range(8)]
        for task in ("red", "blue")
    }
    away = torch.tensor([3.0, 0, 0]).repeat(8, 1)
    features = torch.cat((torch.randn(8, 3) * 0.1 + away, torch.randn(8, 3) * 0.1 - away))
    assert separability(samples, Words(), nn.Embedding(50, 24), features).picture.share == 1
    del samples["red"][0]["image"]
    assert separability(samples, Words(), nn.Embedding(50, 24), features).picture.count == 15
