"""An entry becomes a sample of LLaVA's form, or a reason why it cannot."""

import copy
import json
from types import SimpleNamespace

import pytest

from llava_mixlora.data import conversations
from llava_mixlora.data.conversations import (
    CUT_OFF,
    NO_IMAGE,
    PUT_IN_FRONT,
    Unusable,
    as_sample,
    images_of,
    read_conversations,
)

from ...tiny import message_of

pytestmark = pytest.mark.one_stack


def turns(*texts, first="human"):
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[place % 2], "value": text} for place, text in enumerate(texts)]


def entry(*texts, image="1.png", **fields):
    return {"id": "a", "image": image, "conversations": turns(*texts), **fields}


@pytest.mark.parametrize(
    "sample",
    [
        entry("<image>\nWhat?", "This."),
        entry("What <image> is it?", "This.", task="shape"),
        entry("<image>", "This."),
        entry("<image>\nWhat?", "This.", "And?", "That."),
        entry("What?", "This.", "<image>\nAnd?", "That."),
        {"id": 3, "conversations": turns("What?", "This.")},
        {"conversations": turns("Hello.", "What?", "This.", first="gpt")},
        {"conversations": turns("a < b > c", "<b>yes</b> 蓝色 😀")},
        {"id": float("nan"), "conversations": turns("<Image> as text", "yes")},
    ],
)
def test_llavas_own_form_is_returned_as_it_is(sample):
    assert as_sample(sample) == (sample, ())
    assert as_sample(sample)[0] is sample


@pytest.mark.parametrize(
    "given",
    [
        {"conversations": [{"from": "user", "value": "What?"}, {"from": "assistant", "value": "This."}]},
        {"conversations": [{"from": "Human", "value": "What?"}, {"from": "GPT", "value": "This."}]},
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]},
        {"conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What?"}]},
                {"from": "gpt", "value": "This."},
            ]
        },
    ],
)
def test_other_names_of_turns_are_understood(given):
    before = copy.deepcopy(given)
    assert as_sample({"id": 1, **given}) == ({"id": 1, "conversations": turns("What?", "This.")}, ())
    assert given == before


def test_parts_of_a_message_are_put_together():
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]
    sample, repairs = as_sample({"image": "1.png", "messages": messages})
    assert sample == {"image": "1.png", "conversations": turns("<image>\nWhat?", "This.")} and not repairs


def test_a_list_of_one_image_is_that_image():
    assert as_sample(entry("<image>\nWhat?", "This.", image=["1.png"])) == (entry("<image>\nWhat?", "This."), ())


@pytest.mark.parametrize("image", [None, "", "  ", [], [None], [""]])
@pytest.mark.parametrize("question", ["What?", "<image>\nWhat?"])
def test_no_image_is_text_alone(image, question):
    sample, repairs = as_sample(entry(question, "This.", image=image))
    assert sample == {"id": "a", "conversations": turns("What?", "This.")} and repairs == (NO_IMAGE,)


def test_an_image_that_no_text_speaks_of_is_put_in_front():
    given = entry("What?", "This.", "And?", "That.")
    sample, repairs = as_sample(given)
    assert sample == entry("<image>\nWhat?", "This.", "And?", "That.") and repairs == (PUT_IN_FRONT,)
    assert given == entry("What?", "This.", "And?", "That.")


def test_the_image_goes_behind_an_answer_that_nobody_asked_for():
    sample, _ = as_sample({"image": "1.png", "conversations": turns("Hello.", "What?", "This.", first="gpt")})
    assert sample["conversations"] == turns("Hello.", "<image>\nWhat?", "This.", first="gpt")


def test_a_last_question_without_an_answer_is_cut_off():
    sample, repairs = as_sample(entry("<image>\nWhat?", "This.", "And?"))
    assert sample == entry("<image>\nWhat?", "This.") and repairs == (CUT_OFF,)


def test_several_repairs_are_told():
    _, repairs = as_sample(entry("What?", "This.", "And?"))
    assert set(repairs) == {CUT_OFF, PUT_IN_FRONT}


@pytest.mark.parametrize(
    "given, reason, detail",
    [
        (3, "not a conversation", "int"),
        (None, "not a conversation", "NoneType"),
        ({"id": 1}, "no conversation", "conversations"),
        ({"conversations": "hello"}, "no conversation", "conversations"),
        ({"conversations": []}, "no conversation", "conversations"),
        ({"conversations": ["hello", "you"]}, "no conversation", "turn 0 is of type str"),
        ({"conversations": [{"value": "What?"}]}, "unknown speaker", "None"),
        ({"conversations": [{"from": ["human"], "value": "What?"}]}, "unknown speaker", "turn 0"),
        ({"conversations": [{"from": "robot", "value": "What?"}]}, "unknown speaker", "'robot'"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "a system turn", "leave it out"),
        (entry("<image>\nWhat?", 3), "text is not text", "turn 1 is 3"),
        (entry("<image>\nWhat?", None), "text is not text", "turn 1 is None"),
        (entry([{"type": "audio"}], "This."), "text is not text", "turn 0 has a part"),
        (entry("<image>\nWhat?"), "no question with an answer", "at least"),
        ({"conversations": turns("Hello.", "you", first="gpt")[:1]}, "no question with an answer", "at least"),
        ({"conversations": turns("a", "b")[:1] * 2}, "turns do not alternate", "turn 1 is again of 'human'"),
        ({"conversations": turns("a", "b")[1:] * 2}, "turns do not alternate", "turn 1 is again of 'gpt'"),
        (entry("<image>\nWhat?", ""), "an answer is empty", "fill it in"),
        (entry("<image>\nWhat?", " \n"), "an answer is empty", "fill it in"),
        (entry("<image>\nWhat?", "", "And?", "That."), "an answer is empty", "fill it in"),
        (entry("", "This."), "a question is empty", "fill it in"),
        (entry("<image>", "This.", image=None), "a question is empty", "fill it in"),
        (entry("<image>\nWhat?", "\ud83d"), "broken characters", "lone surrogate"),
        (entry("<image>\n<image>\nWhat?", "This."), "more <image> than images", "2 <image>"),
        (entry("<image>\nWhat?", "This.", "<image>\nAnd?", "That."), "more <image> than images", "2 <image>"),
        (entry("<image>\nWhat?", "<image> blue"), "more <image> than images", "2 <image>"),
        (entry("What?", "<image> blue"), "<image> in an answer", "question"),
        (entry("<Image>\nWhat?", "This."), "mark of the image is not <image>", "<Image>"),
        (entry("<image_1>\nWhat?", "This."), "mark of the image is not <image>", "<image_1>"),
        (entry("< image >What?", "This."), "mark of the image is not <image>", "< image >"),
        (entry("<img>What?", "This."), "mark of the image is not <image>", "<img>"),
        (entry("<image>\n<image>\nWhat?", "This.", image=["1.png", "2.png"]), "several images", "2 images"),
        (entry("<image>\nWhat?", "This.", image=1), "image is no file name", "1"),
        (entry("<image>\nWhat?", "This.", image={"path": "1.png"}), "image is no file name", "path"),
        ({"conversations": turns("<image>\nWhat?", "This.")}, "<image> without an image", "names no image"),
        (
            {"images": ["1.png"], "conversations": turns("<image>\nWhat?", "This.")},
            "no 'image' but 'images'",
            "'images'",
        ),
        ({"video": "1.mp4", "conversations": turns("What?", "This.")}, "no 'image' but 'video'", "'video'"),
    ],
)
def test_entries_that_cannot_be_used_say_why(given, reason, detail):
    with pytest.raises(Unusable) as error:
        as_sample(given)
    assert error.value.reason == reason and detail in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_read_whole_or_its_first_unusable_entry_is_named(tmp_path):
    file = tmp_path / "data.json"
    good = entry("<image>\nWhat?", "This.")
    file.write_text(json.dumps([good, entry("What?", "This.")]))
    assert read_conversations(file) == [good, good]
    file.write_text(json.dumps([good, {"id": 1}, entry("a", "")]))
    assert f"{file}: entry 1: has no usable 'conversations'" in message_of(read_conversations, file)


@pytest.fixture
def several_images(monkeypatch):
    monkeypatch.setattr(conversations, "used", lambda: SimpleNamespace(takes_several_images=True))


def test_several_images_stay_a_list_where_they_are_taken(several_images):
    entry = {"image": ["a.png", "b.png"], "conversations": turns("<image> or <image>?", "red")}
    assert as_sample(entry) == (entry, ())
    assert images_of(entry) == ["a.png", "b.png"] and images_of({"image": "a.png"}) == ["a.png"] and images_of({}) == []


def test_several_images_without_a_mark_are_put_in_front(several_images):
    sample, repairs = as_sample({"image": ["a.png", "b.png"], "conversations": turns("Why?", "red")})
    assert sample["conversations"][0]["value"] == "<image>\n<image>\nWhy?" and repairs == (PUT_IN_FRONT,)


@pytest.mark.parametrize(
    "question, reason",
    [("<image>?", "fewer <image> than images"), ("<image><image><image>", "more <image> than images")],
)
def test_images_and_marks_that_do_not_match_are_refused(several_images, question, reason):
    with pytest.raises(Unusable) as error:
        as_sample({"image": ["a.png", "b.png"], "conversations": turns(question, "red")})
    assert error.value.reason == reason


def test_several_images_are_refused_where_one_is_taken():
    with pytest.raises(Unusable, match="has 2 images; this LLaVA trains on one"):
        as_sample({"image": ["a.png", "b.png"], "conversations": turns("<image><image>?", "red")})
