"""Requests as OpenAI's clients send them, and what is no request: one message that names the field."""

import base64
import io
import json

import pytest
from PIL import Image

from llava_mixlora.serving.chat import Bounds, parse_body, read_request
from llava_mixlora.serving.request_error import RequestError

pytestmark = pytest.mark.one_stack


def data_url(size=(4, 3), form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(url):
    return {"type": "image_url", "image_url": {"url": url}}


def says(text):
    return {"type": "text", "text": text}


def asks(content, **others):
    return {"model": "m", "messages": [{"role": "user", "content": content}], **others}


def read(content, **bounds):
    return read_request(parse_body(json.dumps(content).encode()), Bounds(**bounds))


def test_question_with_a_picture():
    request = read(asks([says("what is it?"), picture(data_url())], max_tokens=7, temperature=0.5, top_p=0.9, seed=3))
    (message,) = request.messages
    assert message.text == "what is it?" and message.pictures[0].size == (4, 3) and message.pictures[0].mode == "RGB"
    assert request.max_tokens == 7 and not request.stream and request.stop == ()
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.seed) == (0.5, 0.9, 3)


def test_answer_is_greedy_unless_told_otherwise():
    request = read(asks("hi"))
    assert request.sampling.temperature == 0 and request.max_tokens is None


def test_conversation_with_a_system_message():
    said = [("developer", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    request = read({"model": "m", "messages": [{"role": role, "content": text} for role, text in said]})
    assert [message.role for message in request.messages] == ["system", "user", "assistant", "user"]
    assert request.questions == 2


def test_what_asks_for_nothing_is_taken():
    others = {"n": 1, "user": "me", "logprobs": False, "tools": [], "frequency_penalty": 0.0, "presence_penalty": 0}
    others |= {"stop": ["x", "y"], "stream": True, "stream_options": {"include_usage": True}, "temperature": None}
    request = read(asks("hi", max_completion_tokens=5, max_tokens=9, response_format={"type": "text"}, **others))
    assert request.max_tokens == 5 and request.stop == ("x", "y") and request.wants_usage


def test_files_are_read_from_the_folder_that_is_allowed_alone(tmp_path):
    folder, outside = tmp_path / "allowed", tmp_path / "outside"
    for place in (folder, outside):
        place.mkdir()
        Image.new("RGB", (5, 5)).save(place / "a b.png")
    (folder / "link.png").symlink_to(outside / "a b.png")
    inside = [f"file://{folder}/a%20b.png", "file:a%20b.png"]
    for url in inside:
        assert read(asks([picture(url)]), image_folder=folder).messages[0].pictures[0].size == (5, 5)
    told = set()
    for url in (f"file://{outside}/a%20b.png", "file:../outside/a%20b.png", "file:link.png", "file:.", "file:none.png"):
        with pytest.raises(RequestError) as refusal:
            read(asks([picture(url)]), image_folder=folder)
        told.add(refusal.value.message.replace(url, "URL"))
    assert told == {"'URL': no such image in the folder that is allowed"}  # whether there is a file is not told
    with pytest.raises(RequestError, match="no files are read here"):
        read(asks([picture(inside[0])]))


def deep(levels):
    return '{"model": "m", "messages": ' + "[" * levels + "]" * levels + "}"


BAD = {
    "no JSON": (b"{", "the body is not JSON"),
    "no text": (b"\xff\xfe", "the body is not JSON"),
    "nothing": (b"", "the body is not JSON"),
    "a list": (b"[]", "the body is a list; expected a JSON object"),
    "deep": (deep(80).encode(), "nested more than 64 deep"),
    "very deep": (deep(100_000).encode(), "nested"),
    "no model": ({"messages": [{"role": "user", "content": "x"}]}, "model: missing or null"),
    "model of a number": (asks("x", model=3), "model: a whole number; expected a text"),
    "no messages": ({"model": "m"}, "messages: missing or null"),
    "messages of a text": ({"model": "m", "messages": "hi"}, "messages: a text; expected a list"),
    "empty messages": ({"model": "m", "messages": []}, "messages: empty"),
    "message of a text": ({"model": "m", "messages": ["hi"]}, r"messages\[0\]: a text; expected an object"),
    "no content": ({"model": "m", "messages": [{"role": "user"}]}, r"messages\[0\].content: missing or null"),
    "empty content": (asks([]), r"messages\[0\].content: a list; expected a text, or a list of parts"),
    "content of a number": (asks(3), r"messages\[0\].content: a whole number"),
    "says nothing": (asks("  "), "it says nothing"),
    "unknown role": ({"model": "m", "messages": [{"role": "tool", "content": "x"}]}, r"role: tool; expected system"),
    "assistant first": ({"model": "m", "messages": [{"role": "assistant", "content": "x"}]}, "messages: assistant;"),
    "assistant last": (
        {"model": "m", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "the user first and last",
    ),
    "system last": (
        {"model": "m", "messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        "messages: user, system;",
    ),
    "tool calls": (
        {"model": "m", "messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
        r"messages\[0\].tool_calls: not offered",
    ),
    "audio": (asks([{"type": "input_audio", "input_audio": {}}]), r"content\[0\]: input_audio; expected a part of"),
    "part without a type": (asks([{"text": "x"}]), r"content\[0\]: an object; expected a part"),
    "text of a number": (asks([{"type": "text", "text": 3}]), r"content\[0\]: text; expected a part"),
    "assistant's picture": (
        {"model": "m", "messages": [{"role": "assistant", "content": [picture("data:x")]}]},
        r"content\[0\]: image_url; expected a text part",
    ),
    "mark of an image": (asks("<image> what?"), "its text holds <image>"),
    "NUL": (asks("a\0b"), "NUL character"),
    "address": (asks([picture("https://example.org/a.png")]), "nothing is fetched here"),
    "no address": (asks([{"type": "image_url", "image_url": {}}]), r"image_url: an object; expected an object with a"),
    "data of no image": (asks([picture("data:text/plain;base64,aGk=")]), "not an image of a known format"),
    "data that is no base64": (asks([picture("data:image/png;base64,***")]), "no base64 data"),
    "data that is not base64": (asks([picture("data:image/png,abc")]), "expected data:image/TYPE;base64,DATA"),
    "damaged": (asks([picture(data_url()[:-40])]), "damaged"),
    "thin": (asks([picture(data_url((1, 5000)))]), "1 x 5000 pixels, an aspect ratio above 200"),
    "too many images": (asks([picture(data_url())] * 5), "more than 4 images"),
    "temperature of a text": (asks("x", temperature="hot"), "temperature: hot; expected a number from 0 to 2"),
    "temperature too high": (asks("x", temperature=2.5), "temperature: 2.5"),
    "temperature not a number": (b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":NaN}', "NaN"),
    "top_p of zero": (asks("x", top_p=0), "top_p: 0; expected a number above 0"),
    "no tokens": (asks("x", max_tokens=0), "max_tokens: 0; expected a whole number from 1 to 4096"),
    "half a token": (asks("x", max_tokens=1.5), "max_tokens: 1.5"),
    "too many tokens": (asks("x", max_completion_tokens=10**9), "max_completion_tokens: 1000000000"),
    "five stops": (asks("x", stop=list("abcde")), "stop: .*a list of up to 4"),
    "empty stop": (asks("x", stop=""), "stop: ; expected a text of 1 to 256 letters"),
    "stream of a text": (asks("x", stream="yes"), "stream: a text; expected true or false"),
    "options of no stream": (asks("x", stream_options={"include_usage": True}), "only where stream is true"),
    "two answers": (asks("x", n=2), "n: 2 is not offered here; leave it out"),
    "tools": (asks("x", tools=[{"type": "function"}]), "tools: .* is not offered here"),
    "log probabilities": (asks("x", logprobs=True), "logprobs: true is not offered here"),
    "JSON mode": (asks("x", response_format={"type": "json_object"}), "response_format: .* is not offered here"),
    "unknown field": (asks("x", tempreature=1), "tempreature: no such field"),
    "seed of a text": (asks("x", seed="one"), "seed: one; expected a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_request_is_named_in_one_line(case):
    content, expected = BAD[case]
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(RequestError, match=expected) as refusal:
        read_request(parse_body(body), Bounds())
    error = refusal.value.as_json()["error"]
    assert refusal.value.status == 400 and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 500


def test_long_conversation_is_refused_before_its_pictures_are_read(monkeypatch):
    monkeypatch.setenv("LLAVA_MIXLORA_INPUT_LIMITS", "prompt_letters=100")
    with pytest.raises(RequestError, match="more than 100 letters"):
        read(asks([says("a" * 101), picture("data:image/png;base64,***")]))


def test_message_quotes_no_more_than_a_line_of_what_was_sent():
    with pytest.raises(RequestError) as refusal:
        read(asks("x", **{"a\nb" + "c" * 1000: 1}))
    assert refusal.value.message == f"a\\nb{'c' * 77}...: no such field"
