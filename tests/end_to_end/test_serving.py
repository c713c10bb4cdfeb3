"""Upstream's controller, model worker and command line, as real processes, with a MixLoRA adapter on the CPU."""

import base64
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from ..tiny import draw_pictures, write_adapter
from .training import environment

NAME = "llava-v1-tiny-mixlora"
PROMPT = "A chat. USER: <image>\nwhat color is the shape? ASSISTANT:"
AT_ONCE = 2  # requests that the worker answers at the same time; more of them wait
PICTURES = 8
TOKENS = 8


class Servers:
    """A controller and a worker; requests to them."""

    def __init__(self, place):
        self.place = place
        self.ports = [free_port(), free_port()]
        self.controller, self.worker = (f"http://localhost:{port}" for port in self.ports)
        self.processes = {}

    def start_controller(self):
        self.processes["controller"] = self._start("controller", f"--port={self.ports[0]}")

    def start_worker(self):
        addresses = [f"--controller-address={self.controller}", f"--worker-address={self.worker}"]
        model = [f"--model-path={self.place / NAME}", "--device=cpu", f"--limit-model-concurrency={AT_ONCE}"]
        self.processes["model_worker"] = self._start("model_worker", f"--port={self.ports[1]}", *addresses, *model)

    def _start(self, program, *flags):
        with (self.place / f"{program}.out").open("a") as out:
            words = [sys.executable, "-m", "llava_mixlora", "run", "-m", f"llava.serve.{program}", *flags]
            return subprocess.Popen(words, cwd=self.place, env=environment(), stdout=out, stderr=subprocess.STDOUT)

    def stop(self, name):
        process = self.processes.pop(name)
        process.terminate()
        assert process.wait(20) is not None

    def printed(self, program):
        return (self.place / f"{program}.out").read_text()

    def models(self):
        return requests.post(f"{self.controller}/list_models", timeout=10).json()["models"]

    def wait_for_models(self, expected):
        def there():
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended: {self.printed(name)[-3000:]}"
            try:
                if expected:  # a worker registers before it listens
                    requests.post(f"{self.worker}/worker_get_status", timeout=10)
                return self.models() == expected
            except requests.ConnectionError:
                return False

        wait_until(there, 120)

    def busy(self):
        return requests.post(f"{self.worker}/worker_get_status", timeout=10).json()["queue_length"]

    def request(self, number):
        image = base64.b64encode((self.place / f"{number}.png").read_bytes()).decode()
        options = {"model": NAME, "temperature": 0, "max_new_tokens": TOKENS, "stop": "</s>"}
        return {"prompt": PROMPT, "images": [image], **options}

    def post(self, body, **options):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(f"{self.worker}/worker_generate_stream", data=body, timeout=60, **options)

    def ask(self, number):
        """The texts of the stream, each of which goes on from the one before."""
        chunks = [json.loads(chunk) for chunk in self.post(self.request(number)).content.split(b"\0") if chunk]
        assert all(chunk["error_code"] == 0 for chunk in chunks), chunks
        return [chunk["text"] for chunk in chunks]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def place(llava_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("serving")
    write_adapter(llava_folder, place / NAME)
    draw_pictures(place, PICTURES)
    return place


@pytest.fixture(scope="module")
def servers(place):
    servers = Servers(place)
    try:
        servers.start_controller()
        servers.wait_for_models([])
        servers.start_worker()
        servers.wait_for_models([NAME])
        yield servers
    finally:
        for process in servers.processes.values():
            process.kill()


@pytest.fixture(scope="module")
def alone(servers):
    """What each picture is answered when nothing else is asked."""
    answers = [servers.ask(number) for number in range(PICTURES)]
    assert len({texts[-1] for texts in answers}) > PICTURES // 2, "the model does not tell the pictures apart"
    return answers


def test_worker_is_found_through_the_controller(servers):
    found = requests.post(f"{servers.controller}/get_worker_address", json={"model": NAME}, timeout=10).json()
    assert found == {"address": servers.worker}
    nowhere = requests.post(f"{servers.controller}/get_worker_address", json={"model": "other"}, timeout=10).json()
    assert nowhere == {"address": ""}


def test_answer_is_streamed_and_grows(servers, alone):
    for texts in alone:
        assert len(texts) > 4 and texts[-1].startswith(PROMPT) and len(texts[-1]) > len(PROMPT)
        assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))


def test_stream_passes_through_the_controller(servers, alone):
    url = f"{servers.controller}/worker_generate_stream"
    chunks = requests.post(url, json=servers.request(3), timeout=60).content.split(b"\0")
    assert [json.loads(chunk)["text"] for chunk in chunks if chunk] == alone[3]


def test_requests_at_once_are_answered_as_alone(servers, alone):
    with ThreadPoolExecutor(PICTURES) as pool:
        assert list(pool.map(servers.ask, range(PICTURES))) == alone
    wait_until(lambda: servers.busy() == 0, 5)


def without(request, name):
    return {key: value for key, value in request.items() if key != name}


MALFORMED = {
    "no JSON": lambda good: b'{"prompt": ',
    "no text": lambda good: b"\xff\xfe",
    "no object": lambda good: [1],
    "no prompt": lambda good: without(good, "prompt"),
    "prompt is a number": lambda good: {**good, "prompt": 5},
    "no stop": lambda good: without(good, "stop"),
    "temperature is a word": lambda good: {**good, "temperature": "warm"},
    "no images": lambda good: without(good, "images"),
    "images are null": lambda good: {**good, "images": None},
    "images are empty": lambda good: {**good, "images": []},
    "image is not base64": lambda good: {**good, "images": ["@"]},
    "image is no image": lambda good: {**good, "images": [base64.b64encode(b"hello").decode()]},
    "image is cut off": lambda good: {**good, "images": [good["images"][0][:80]]},
    "two images for one place": lambda good: {**good, "images": 2 * good["images"]},
    "one image for two places": lambda good: {**good, "prompt": 2 * PROMPT},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_request_is_answered_with_an_error_and_holds_no_place(servers, alone, kind):
    body, began = MALFORMED[kind](servers.request(0)), time.monotonic()
    for _ in range(AT_ONCE + 1):
        answer = servers.post(body)
        chunks = [json.loads(chunk) for chunk in answer.content.split(b"\0") if chunk] if answer.ok else []
        assert answer.status_code == 500 or chunks[-1]["error_code"] == 1
    assert time.monotonic() - began < 10  # upstream lets some wait for 15 seconds each
    wait_until(lambda: servers.busy() == 0, 5)
    assert servers.ask(0) == alone[0]


def test_prompt_without_its_image_does_not_reach_the_model(servers):
    servers.post(without(servers.request(0), "images"))
    assert "the prompt has places for 1 images, but the request has none" in servers.printed("model_worker")


def test_clients_that_leave_give_their_places_free(servers, alone):
    request = {**servers.request(0), "max_new_tokens": 200, "stop": "never said"}
    for _ in range(2 * AT_ONCE):
        with servers.post(request, stream=True) as answer:
            next(answer.iter_content(16))
    wait_until(lambda: servers.busy() == 0, 5)
    assert servers.ask(0) == alone[0]


def test_worker_goes_on_without_its_controller_and_comes_back_to_a_new_one(servers, alone):
    servers.stop("controller")
    with ThreadPoolExecutor(PICTURES) as pool:
        assert list(pool.map(servers.ask, range(PICTURES))) == alone
    servers.start_controller()
    servers.wait_for_models([NAME])
    assert servers.ask(1) == alone[1]


def test_servers_end_when_they_are_told_to(servers):
    for name in list(servers.processes):
        servers.stop(name)


def test_command_line_answers_a_question_and_ends(place):
    words = [f"--model-path={place / NAME}", f"--image-file={place / '0.png'}", "--device=cpu", "--temperature=0"]
    done = subprocess.run(
        [sys.executable, "-m", "llava_mixlora", "run", "-m", "llava.serve.cli", *words, "--max-new-tokens=8"],
        input="what color is the shape?\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = done.stdout.partition("ASSISTANT: ")[2].partition("USER: ")[0]
    assert answer.strip() and done.stdout.rstrip().endswith("exit...")
