"""`llava-mixlora serve --engine vllm` with vLLM itself, which serves each prompt the LoRA that the adapter is for it.

`scripts/test_vllm.sh` makes the environment, and nothing else does.
"""

import concurrent.futures
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import Question
from llava_mixlora.inference.loading import load_for_inference

from ..conftest import LLAMA
from ..tiny import VOCABULARY, draw_pictures, write_adapter
from .test_serve import QUESTIONS, ask, client_of, message, serving, text_of

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="vLLM is not there; bash scripts/test_vllm.sh installs it")
TOKENS = 6
WIDE = {**LLAMA, "hidden_size": 128, "intermediate_size": 96}  # vLLM on the CPU takes heads of 32 numbers or more


@pytest.fixture(scope="module")
def place(tmp_path_factory, patched, clip_folder, exact_tokenizer_folder):
    """A base, pictures, and an adapter whose routers see hidden states: the prompt is run for its routes."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    place = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(3)
    told = {"mm_vision_tower": str(clip_folder), "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 16}
    told |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "use_mm_proj": True}
    config = LlavaConfig(vocab_size=VOCABULARY, mm_use_im_start_end=False, mm_use_im_patch_token=False, **told, **WIDE)
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    model.save_pretrained(place / "llava")
    shutil.copytree(exact_tokenizer_folder, place / "llava", dirs_exist_ok=True)
    draw_pictures(place, 6)
    write_adapter(place / "llava", place / "mine", pairing="same", router_scope="instruction", router_input="hidden")
    return place


@pytest.fixture(scope="module")
def asked(place):
    return [(question, place / f"{number}.png") for number in range(6) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(place, asked):
    questions = [Question(str(number), "t", question, image) for number, (question, image) in enumerate(asked)]
    batches = answer(load_for_inference(place / "mine"), questions, "v1", max_new_tokens=TOKENS, progress=False)
    return [text for _, answers in batches for text in answers]


@pytest.fixture(scope="module")
def server(place):
    with serving(place / "mine", "--engine", "vllm", "--engine-python", PYTHON) as (process, address):
        yield process, address


def processes(words):
    """Ids of processes with these words in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in command for word in words):
            found.append(int(folder.name))
    return sorted(found)


def shelves():
    return set(Path("/dev/shm").glob("llava-mixlora-*"))


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.2)
    return found


@pytest.mark.parametrize("at_a_time", [1, 8])
def test_answers_are_those_of_eval(server, asked, expected, at_a_time):
    client = client_of(server[1])
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        found = list(pool.map(lambda each: text_of(ask(client, *each)), asked))
    assert found == expected and len(set(expected)) > 4


def test_base_is_the_model_without_the_adapter(server, asked, expected):
    client = client_of(server[1])
    found = [text_of(ask(client, *each, model="mine:base")) for each in asked[:6]]
    assert found != expected[:6]


def test_stream_and_routes_are_as_in_this_process(server, asked, expected, place):
    client = client_of(server[1])
    chunks = list(ask(client, *asked[0], stream=True, extra_body={"mixlora_routes": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected[0] and len(chunks[-1].mixlora_routes) == 14
    with serving(place / "mine") as (_, address):
        answered = ask(client_of(address), *asked[0], extra_body={"mixlora_routes": True})
        assert answered.mixlora_routes == chunks[-1].mixlora_routes
        conversation = [message(*asked[0]), {"role": "assistant", "content": "red"}, message(QUESTIONS[1])]
        said = {"model": "mine", "messages": conversation, "max_tokens": TOKENS}
        here, there = (each.chat.completions.create(**said) for each in (client_of(address), client))
        assert text_of(here) == text_of(there)


def test_refusals_of_the_engine_are_the_clients(server):
    with pytest.raises(openai.BadRequestError):
        ask(client_of(server[1]), "word " * 300)


def test_no_lora_is_left_and_an_engine_that_dies_comes_back(server, place, asked, expected):
    client = client_of(server[1])
    (shelf,) = shelves()
    assert shelf.stat().st_mode & 0o777 == 0o700
    for _ in range(5):  # those who leave leave nothing either
        stream = ask(client, *asked[0], stream=True, max_tokens=100)
        next(iter(stream))
        stream.close()
    wait_until(lambda: not list(shelf.iterdir()), 10)
    os.kill(processes(["api_server", str(place)])[0], signal.SIGKILL)
    refused = set()

    def answers_again():
        try:
            return text_of(ask(client, *asked[0]))
        except openai.APIStatusError as error:
            refused.add(error.status_code)

    assert wait_until(answers_again, 240) == expected[0] and refused == {503}
    assert not list(shelf.iterdir())


def test_killed_server_leaves_no_engine_and_no_file(place):
    before = shelves()
    with serving(place / "mine", "--engine", "vllm", "--engine-python", PYTHON) as (process, _):
        engines = processes(["api_server", str(place)])
        (shelf,) = shelves() - before
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        wait_until(lambda: not shelf.exists() and not set(engines) & set(processes(["api_server", str(place)])), 20)


def test_what_vllm_loads_is_made_once(place):
    made_of = json.loads((place / "mine-hf" / "made_of.json").read_text())
    assert set(made_of) == {"weights"} and (place / "mine-hf" / "model.safetensors").is_file()
