"""`llava-mixlora serve` as a process, asked by OpenAI's own client: answers are those of `llava-mixlora eval`."""

import base64
import concurrent.futures
import json
import signal
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch

from llava_mixlora.cli import main
from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import Question
from llava_mixlora.inference.loading import load_for_inference

from ..tiny import draw_pictures, write_adapter
from .training import PLUGIN, environment

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

QUESTIONS = ["what color is the shape?", "red green blue", "circle", "what is the shape between a square and a circle?"]
TOKENS = 6
FORM = {"pairing": "same", "router_scope": "instruction", "router_input": "words"}


@contextmanager
def serving(*words, env=None):
    """A server on a free port; gives its process and its address."""
    command = [*PLUGIN, "serve", *map(str, words), "--port", "0"]
    told = {**environment(), **(env or {})}
    process = subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = next((line for line in process.stdout if line.startswith("Serving ")), None)
        assert line is not None, process.communicate()[1][-3000:]
        yield process, line.split(" at ")[1].split()[0].removesuffix("/v1")
    finally:
        process.kill()
        process.communicate()


def client_of(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def place(tmp_path_factory, llava_folder):
    place = tmp_path_factory.mktemp("serve")
    draw_pictures(place, 4)
    write_adapter(llava_folder, place / "mine", **FORM)
    return place


@pytest.fixture(scope="module")
def server(place):
    with serving(place / "mine", "--allowed-image-folder", place) as (process, address):
        yield process, address


@pytest.fixture(scope="module")
def client(server):
    return client_of(server[1])


@pytest.fixture(scope="module")
def asked(place):
    return [(question, place / f"{number}.png") for number in range(4) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(place, asked):
    """What `llava-mixlora eval` says."""
    questions = [Question(str(number), "t", question, image) for number, (question, image) in enumerate(asked)]
    batches = answer(load_for_inference(place / "mine"), questions, "v1", max_new_tokens=TOKENS, progress=False)
    return [text for _, answers in batches for text in answers]


def message(question, image=None):
    parts = [{"type": "text", "text": question}]
    if image is not None:
        data = base64.b64encode(image.read_bytes()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return {"role": "user", "content": parts}


def ask(client, question, image=None, model="mine", **options):
    said = {"model": model, "messages": [message(question, image)], "max_tokens": TOKENS, **options}
    return client.chat.completions.create(**said)


def text_of(completion):
    return completion.choices[0].message.content


def post(address, body, **headers):
    """The status and the JSON of an answer."""
    headers = {"content-type": "application/json", **headers}
    request = urllib.request.Request(f"{address}/v1/chat/completions", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_models_are_the_adapter_and_its_base(client):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"mine", "mine:base"} and models["mine"].parent == "mine:base"
    assert client.models.retrieve("mine").conversation == "v1"


@pytest.mark.parametrize("at_a_time", [1, 8])
def test_answers_are_those_of_eval_however_many_ask(client, asked, expected, at_a_time):
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        found = list(pool.map(lambda each: text_of(ask(client, *each)), asked))
    assert found == expected and len(set(expected)) > 4


def test_stream_is_the_answer_in_pieces(client, asked, expected):
    for each, whole in list(zip(asked, expected))[:4]:
        chunks = list(ask(client, *each, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole
        finished = [
            chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason
        ]
        assert finished in (["length"], ["stop"]) and 1 <= chunks[-1].usage.completion_tokens <= TOKENS


def test_base_answers_without_the_adapter(client, asked, expected, place):
    tokenizer, model, processor = load_for_inference(place / "mine")
    questions = [Question(str(number), "t", question, image) for number, (question, image) in enumerate(asked)]
    with model.disable_adapter():
        batches = answer((tokenizer, model, processor), questions, "v1", max_new_tokens=TOKENS, progress=False)
        without = [text for _, answers in batches for text in answers]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # both in the same batches
        mixed = [model for _ in asked for model in ("mine", "mine:base")]
        twice = [each for each in asked for _ in range(2)]
        found = list(pool.map(lambda each, model: text_of(ask(client, *each, model=model)), twice, mixed))
    assert found[1::2] == without != expected and found[::2] == expected


def test_usage_counts_the_picture_and_stop_ends_the_answer(client, asked, expected):
    with_picture, without = ask(client, *asked[0]), ask(client, asked[0][0])
    # Four features, and the line's end behind them.
    assert with_picture.usage.prompt_tokens >= without.usage.prompt_tokens + 4
    whole = expected[0]
    stopped = ask(client, *asked[0], stop=[whole[1:3]])
    assert text_of(stopped) == whole[: whole.find(whole[1:3])].strip() and stopped.choices[0].finish_reason == "stop"
    short = ask(client, *asked[0], max_tokens=1)
    assert short.usage.completion_tokens == 1 and short.choices[0].finish_reason == "length"


def test_routes_are_told_where_they_are_asked_for(client, asked):
    routes = [ask(client, *each, extra_body={"mixlora_routes": True}).mixlora_routes for each in asked[:2]]
    assert len(routes[0]) == 14 and routes[0] != routes[1]
    assert all(len(of_a) == len(of_b) == 2 for of_a, of_b in routes[0].values())
    assert not hasattr(ask(client, *asked[0]), "mixlora_routes")


def test_sampling_follows_its_seed(client, asked):
    hot = {"temperature": 2.0, "top_p": 1.0}
    drawn = [text_of(ask(client, *asked[0], seed=seed, **hot)) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_file_of_the_allowed_folder_is_the_same_picture(client, asked, expected, place):
    parts = [{"type": "image_url", "image_url": {"url": "file:0.png"}}, {"type": "text", "text": asked[0][0]}]
    said = {"model": "mine", "messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS}
    assert text_of(client.chat.completions.create(**said)) == expected[0]


def test_each_question_of_a_conversation_is_routed_by_itself(client, asked):
    def routes(first, last):
        messages = [message(first, asked[0][1]), {"role": "assistant", "content": "red"}, message(last)]
        options = {"model": "mine", "max_tokens": TOKENS, "extra_body": {"mixlora_routes": True}}
        return client.chat.completions.create(messages=messages, **options).mixlora_routes

    assert routes(QUESTIONS[0], QUESTIONS[2]) == routes(QUESTIONS[1], QUESTIONS[2])
    assert routes(QUESTIONS[0], QUESTIONS[2]) != routes(QUESTIONS[0], QUESTIONS[1])


MALFORMED = [b"{", b"", b"[]", b"\xff", b"null", b'"x"', b"[" * 100_000, b'{"model": "mine"}']
MALFORMED += [
    json.dumps({"model": "mine", "messages": messages}).encode()
    for messages in (
        [],
        "x",
        None,
        [3],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:../../../etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "javascript:alert(1)"}}]}],
        [{"role": "user", "content": "<image>"}],
        [{"role": "user", "content": "a" * 300_000}],
        [{"role": "user", "content": "word " * 400}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}] * 2,
    )
]
MALFORMED += [
    json.dumps({"model": "mine", "messages": [{"role": "user", "content": "x"}], **more}).encode()
    for more in (
        {"model": "gpt-4o"},
        {"model": ""},
        {"model": None},
        {"temperature": -1},
        {"temperature": "1"},
        {"top_p": 7},
        {"max_tokens": -1},
        {"max_tokens": 10**12},
        {"n": 3},
        {"stop": [1]},
        {"stream": 1},
        {"tools": [{}]},
        {"logprobs": True},
        {"unheard_of": {}},
        {"response_format": {"type": "json_object"}},
        {"seed": 1.5},
    )
]


def test_malformed_requests_are_refused_within_a_second_and_their_neighbours_unharmed(server, client, asked, expected):
    assert len(MALFORMED) >= 40
    address = server[1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        neighbours = [pool.submit(ask, client, *each) for each in asked]
        slow = []
        for body in MALFORMED:
            began = time.monotonic()
            status, content = post(address, body)
            slow += [body[:80]] if time.monotonic() - began > 1 else []
            assert 400 <= status < 500 and content["error"]["type"] == "invalid_request_error", (status, body[:80])
            assert "\n" not in content["error"]["message"]
        assert [text_of(each.result()) for each in neighbours] == expected
    assert not slow
    assert post(address, b"{}", **{"content-type": "text/plain"})[0] == 415
    assert post(address, b" " * (33 << 20))[0] == 413


def test_refusals_reach_openais_client_as_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="expected one of mine"):
        ask(client, "x", model="gpt-4o")
    with pytest.raises(openai.BadRequestError, match="shorten it, or ask for fewer max_tokens") as refusal:
        ask(client, "word " * 300)
    assert refusal.value.code == "context_length_exceeded"


def counts(address):
    with urllib.request.urlopen(f"{address}/health") as response:
        return json.load(response)


def test_who_leaves_frees_its_place(server, client):
    address = server[1]
    for _ in range(20):
        stream = ask(client, "what color is the shape?", stream=True, max_tokens=100)
        next(iter(stream))
        stream.close()
    until = time.monotonic() + 10
    while counts(address) != {"status": "ok", "answering": 0, "waiting": 0}:
        assert time.monotonic() < until, counts(address)
        time.sleep(0.05)


def test_more_than_may_wait_are_told_to_come_again(place, asked):
    words = [place / "mine", "--batch-size", "1", "--queue", "1", "--api-key", "secret"]
    with serving(*words) as (process, address), concurrent.futures.ThreadPoolExecutor(12) as pool:
        with pytest.raises(openai.AuthenticationError):
            ask(client_of(address, "wrong"), "x")
        client = client_of(address, "secret")
        asking = [pool.submit(ask, client, *asked[0], max_tokens=100) for _ in range(12)]
        outcomes = [each.exception() for each in asking]
        refused = [error for error in outcomes if error is not None]
        assert refused and all(type(error) is openai.RateLimitError for error in refused)
        assert len(refused) < 12 and text_of(ask(client, *asked[0])) is not None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def refusal(*words):
    done = subprocess.run([*PLUGIN, "serve", *map(str, words)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("llava-mixlora: error: ")]
    return line


def test_others_are_let_in_only_where_that_is_said(place):
    assert "--api-key KEY" in refusal(place / "mine", "--host", "0.0.0.0")


def test_what_cannot_be_served_is_named(place, capsys):
    for words, problem in (
        ([place / "mine", "--host", "::"], "--no-auth"),
        ([place / "none"], "no such"),
        ([place / "mine", place / "mine"], "NAME=MODEL"),
        ([place / "mine", "--allowed-image-folder", place / "none"], "--allowed-image-folder"),
        ([place / "mine", "--host", "192.0.2.1", "--no-auth"], "cannot listen there"),
    ):
        assert main(["serve", *map(str, words)]) == 1
        assert problem in capsys.readouterr().err


def test_several_models_are_asked_by_their_names(place, llava_folder, asked, expected):
    torch.manual_seed(5)
    write_adapter(llava_folder, place / "other", pairing="rank", router_scope="prompt", router_input="hidden")
    with serving(place / "mine", f"second={place / 'other'}", llava_folder) as (_, address):
        client = client_of(address)
        names = {model.id for model in client.models.list()}
        assert names == {"mine", "mine:base", "second", "second:base", llava_folder.name}
        found = {name: text_of(ask(client, *asked[0], model=name)) for name in names}
    assert found["mine"] == expected[0] and len(set(found.values())) > 2
