"""Metrics against independent implementations: scikit-learn's, upstream's, and cases counted by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from llava_mixlora.evaluation.metrics import contained_match, exact_match, mme, pope, says_yes

pytestmark = pytest.mark.one_stack

ANSWERS = ["Yes", "no", "No.", "yes, there is", "There is not", "No, there is none. Yes", "a nod", "yes. no", ""]
yes_or_no = st.sampled_from(["yes", "no"])


@given(st.lists(st.tuples(st.sampled_from(ANSWERS), yes_or_no), min_size=1, max_size=30))
def test_pope_is_what_scikit_learn_counts(pairs):
    answers, targets = zip(*pairs)
    found = pope(answers, targets)
    said, wanted = [says_yes(answer) for answer in answers], [target == "yes" for target in targets]
    precision, recall, f1, _ = precision_recall_fscore_support(wanted, said, average="binary", zero_division=0)
    expected = (accuracy_score(wanted, said), precision, recall, f1, sum(said) / len(said))
    assert (found.accuracy, found.precision, found.recall, found.f1, found.yes_share) == pytest.approx(expected)


def test_pope_is_what_upstream_prints(patched, tmp_path, capsys):
    from llava.eval.eval_pope import eval_pope

    targets = ["yes", "no", "yes", "no", "yes", "no", "no", "yes", "no"]
    (tmp_path / "labels.json").write_text("".join(json.dumps({"label": target}) + "\n" for target in targets))
    eval_pope([{"text": answer} for answer in ANSWERS], str(tmp_path / "labels.json"))
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    found = pope(ANSWERS, targets)
    figures = (found.f1, found.accuracy, found.precision, found.recall, found.yes_share)
    assert printed == ", ".join(f"{figure:.3f}" for figure in figures)


def test_mme_counts_an_image_only_if_both_answers_are_right():
    rows = [
        ("existence", "a", "Yes", "Yes"),
        ("existence", "a", "No.", "No"),  # a: both right
        ("existence", "b", "yes", "Yes"),
        ("existence", "b", "Yes, it is", "No"),  # b: one
        ("code_reasoning", "a", "no idea", "No"),
        ("code_reasoning", "a", "maybe", "Yes"),  # neither yes nor no
    ]
    found = mme(*zip(*rows))
    assert found.accuracy == {"existence": 75.0, "code_reasoning": 50.0}
    assert found.accuracy_plus == {"existence": 50.0, "code_reasoning": 0.0}
    assert (found.perception, found.cognition) == (125.0, 50.0)


@pytest.mark.parametrize(
    ("answer", "target", "exact", "contained"),
    [
        ("Red.", "red", True, True),
        (" red ", "Red", True, True),
        ("it is red", "red", False, True),
        ("it is reddish", "red", False, False),
        ("a stop sign, I think", "stop sign", False, True),
        ("sign stop", "stop sign", False, False),
        ("", "red", False, False),
        ("seven", "7", False, False),
    ],
)
def test_matches(answer, target, exact, contained):
    assert (exact_match(answer, target), contained_match(answer, target)) == (exact, contained)
