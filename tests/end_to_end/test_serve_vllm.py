"""`llava-mixlora serve --engine vllm` with vLLM itself, which serves each prompt the LoRA that the adapter is for it.

`scripts/test_vllm.sh` makes the environment, and nothing else does.
"""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import Question
from llava_mixlora.inference.loading import load_for_inference
from llava_mixlora.serving.chat import Message
from llava_mixlora.serving.prompts import Prompts, inputs_of

from ..conftest import LLAMA
from ..tiny import VOCABULARY, draw_pictures, write_adapter
from .test_serve import FORM, QUESTIONS, ask, client_of, counts, message, serving, text_of

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="vLLM is not there; bash scripts/test_vllm.sh installs it")
TOKENS = 6
BYTES = slice(3, 3 + 256)  # tokens of the tokenizer that are single bytes
PICTURES, LEAD = 6, 0.03
ALL_QUESTIONS = [
    *QUESTIONS,
    "red square",
    "a chat between a human and an assistant",
    "green shape",
    "what human is it?",
]
NAMES = ["mine", "words", "mine:base"]
WIDE = {**LLAMA, "hidden_size": 128, "intermediate_size": 96}  # vLLM on the CPU takes heads of 32 numbers or more


@pytest.fixture(scope="module")
def place(tmp_path_factory, patched, clip_folder, exact_tokenizer_folder):
    """A base that speaks, pictures, and two adapters: by hidden states, for which the prompt is run, and by words."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    place = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(3)
    told = {"mm_vision_tower": str(clip_folder), "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 16}
    told |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "use_mm_proj": True}
    config = LlavaConfig(vocab_size=VOCABULARY, mm_use_im_start_end=False, mm_use_im_patch_token=False, **told, **WIDE)
    model = LlavaLlamaForCausalLM(config)
    # It says words. Of bytes that make no letter upstream's decoding writes replacement characters, vLLM's nothing.
    model.lm_head.weight.data[BYTES] = 0
    model.get_vision_tower().load_model()
    model.save_pretrained(place / "llava")
    shutil.copytree(exact_tokenizer_folder, place / "llava", dirs_exist_ok=True)
    draw_pictures(place, PICTURES)
    write_adapter(place / "llava", place / "mine", pairing="same", router_scope="instruction", router_input="hidden")
    write_adapter(place / "llava", place / "words", **FORM)
    return place


@pytest.fixture(scope="module")
def loaded(place):
    return {name: load_for_inference(place / name) for name in ("mine", "words")}


@pytest.fixture(scope="module")
def asked(place, loaded):
    """By the name of a model questions to which it is sure of each token: vLLM rounds otherwise, also without LoRAs."""
    everything = [(question, place / f"{number}.png") for number in range(PICTURES) for question in ALL_QUESTIONS]
    return {name: [each for each in everything if lead(loaded, name, *each) > LEAD] for name in NAMES}


def model_called(loaded, name):
    """What is loaded, and what to ask it in: without its adapter where the base is meant."""
    found = loaded[name.removesuffix(":base")]
    return found, found[1].disable_adapter() if name.endswith(":base") else contextlib.nullcontext()


def lead(loaded, name, question, picture):
    """By how much the most likely token leads where it leads by least."""
    found, asking = model_called(loaded, name)
    prompt = Prompts(found, "v1").prompt([Message("user", question, (Image.open(picture),))])
    inputs, _ = inputs_of(found, [prompt])
    ids, told = inputs.pop("input_ids"), {"do_sample": False, "max_new_tokens": TOKENS}
    with asking, torch.inference_mode():
        done = found[1].generate(ids, **inputs, **told, output_scores=True, return_dict_in_generate=True)
    best = torch.cat(done.scores).topk(2).values
    return (best[:, 0] - best[:, 1]).min().item()


@pytest.fixture(scope="module")
def expected(loaded, asked):
    """By the name of a model what `llava-mixlora eval` says."""
    found = {}
    for name in NAMES:
        questions = [Question(str(number), "t", *each) for number, each in enumerate(asked[name])]
        model, asking = model_called(loaded, name)
        with asking:
            batches = answer(model, questions, "v1", max_new_tokens=TOKENS, progress=False)
            found[name] = [text for _, answers in batches for text in answers]
    assert all(len(set(texts)) > 4 for texts in found.values()), found
    assert len({texts[0] for texts in found.values()}) == len(NAMES)
    return found


@pytest.fixture(scope="module")
def server(place):
    with serving_vllm(place) as (process, address):
        yield process, address


def serving_vllm(place, *flags):
    return serving(place / "mine", place / "words", "--engine", "vllm", "--engine-python", PYTHON, *flags)


def answers(address, asked, name, at_a_time):
    """Of a model to all that is asked."""
    client = client_of(address)
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        return list(pool.map(lambda each: text_of(ask(client, *each, model=name)), asked))


def shelves():
    return set(Path("/dev/shm").glob("llava-mixlora-*"))


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.2)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at_a_time", [1, 8])
def test_answers_are_those_of_eval(server, asked, expected, name, at_a_time):
    assert answers(server[1], asked[name], name, at_a_time) == expected[name]


def test_adapters_and_base_are_answered_side_by_side(server, asked, expected):
    client = client_of(server[1])
    mixed = [(name, number) for number in range(8) for name in NAMES]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: text_of(ask(client, *asked[each[0]][each[1]], model=each[0])), mixed))
    assert found == [expected[name][number] for name, number in mixed]


def test_stream_and_routes_are_as_in_this_process(server, asked, expected, place):
    client = client_of(server[1])
    told = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"mixlora_routes": True}}
    *chunks, last = ask(client, *asked["mine"][0], **told)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected["mine"][0] and len(chunks[-1].mixlora_routes) == 14
    with serving(place / "mine", place / "words") as (_, address):
        here = client_of(address)
        for name in ("mine", "words"):
            both = [
                ask(each, *asked[name][1], model=name, extra_body={"mixlora_routes": True}) for each in (client, here)
            ]
            assert both[0].mixlora_routes == both[1].mixlora_routes and both[0].usage == both[1].usage
        assert ask(here, *asked["mine"][0]).usage == last.usage
        stop = expected["mine"][0][2:4]
        for options in ({"stop": [stop]}, {"max_tokens": 1}, {"max_tokens": None}):
            both = [ask(each, *asked["mine"][0], **options).choices[0] for each in (client, here)]
            assert both[0].finish_reason == both[1].finish_reason
            texts = [each.message.content[: len(expected["mine"][0])] for each in both]  # sure of so much
            assert texts[0] == texts[1]
        conversation = [message(*asked["mine"][0]), {"role": "assistant", "content": "red"}, message(QUESTIONS[1])]
        said = {"model": "mine", "messages": conversation, "max_tokens": TOKENS}
        assert text_of(here.chat.completions.create(**said)) == text_of(client.chat.completions.create(**said))


def test_refusals_are_those_of_this_process(server):
    with pytest.raises(openai.BadRequestError, match="shorten it, or ask for fewer max_tokens") as refusal:
        ask(client_of(server[1]), "word " * 300)
    assert refusal.value.code == "context_length_exceeded"


def left(shelf, address):
    """LoRAs on the shelf, those that vLLM knows, and requests that hold a place."""
    files = [folder.name for folder in shelf.iterdir()]
    return files or [counts(address)] * (counts(address) != {"status": "ok", "answering": 0, "waiting": 0})


def test_after_many_requests_nothing_is_left(server, asked):
    (shelf,) = shelves()
    assert shelf.stat().st_mode & 0o777 == 0o700
    client = client_of(server[1])

    def ask_or_leave(number):
        name = NAMES[number % 3]
        stream = ask(client, *asked[name][number % len(asked[name])], model=name, stream=True)
        if number % 5:
            return [chunk for chunk in stream if chunk.choices and chunk.choices[0].finish_reason]
        return stream.close() if number % 2 else [next(iter(stream)), stream.close()]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        done = list(pool.map(ask_or_leave, range(200)))
    assert sum(bool(each) for each in done) >= 160
    wait_until(lambda: not left(shelf, server[1]), 20)
    assert loras_of_vllm(server[0]) == []


def loras_of_vllm(server):
    """Those that the vLLM of a server knows by name, asked as the server asks."""
    engine = engine_of(server)
    told = dict(line.split("=", 1) for line in Path(f"/proc/{engine}/environ").read_text().split("\0") if "=" in line)
    words = Path(f"/proc/{engine}/cmdline").read_text().split("\0")
    port = words[words.index("--port") + 1]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models")
    request.add_header("authorization", f"Bearer {told['VLLM_API_KEY']}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return [model["id"] for model in json.load(response)["data"] if model.get("parent")]


def engine_of(server):
    """The process of vLLM's API server that a server has begun; it leads a group."""
    found = [each for each in numbers_of_processes() if (told := stat_of(each)) and told[1] == str(server.pid)]
    (engine,) = [each for each in found if b"vllm.entrypoints" in Path(f"/proc/{each}/cmdline").read_bytes()]
    return engine


def members_of(group):
    """Processes of a group that run."""
    everyone = numbers_of_processes()
    return [each for each in everyone if (told := stat_of(each)) and told[2] == str(group) and told[0] != "Z"]


def numbers_of_processes():
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def stat_of(process):
    """State, parent and group."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None


def test_engine_that_dies_comes_back(server, asked, expected):
    client = client_of(server[1])
    (shelf,) = shelves()
    os.kill(engine_of(server[0]), signal.SIGKILL)
    refused = set()

    def answers_again():
        try:
            return text_of(ask(client, *asked["mine"][0]))
        except openai.APIStatusError as error:
            refused.add(error.status_code)

    assert wait_until(answers_again, 240) == expected["mine"][0] and refused == {503}
    assert not list(shelf.iterdir())


TWO_ENGINES = "--data-parallel-size 2 --max-loras 2 --max-cpu-loras 2"


def test_two_engines_answer_as_one_and_leave_nothing_when_the_server_is_killed(place, asked, expected):
    """Each has room for fewer LoRAs than there are requests."""
    before, memory = shelves(), shared_memory()
    with serving_vllm(place, "--engine-flags", TWO_ENGINES, "--lora-folder", place) as (process, address):
        for name in NAMES:
            assert answers(address, asked[name], name, 8) == expected[name]
        engine = engine_of(process)
        (shelf,) = place.glob("llava-mixlora-*")
        assert shelves() == before
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        wait_until(lambda: not shelf.exists() and not members_of(engine), 20)
        assert shared_memory() <= memory


def shared_memory():
    """What programs of Python share, vLLM's workers too."""
    return {*Path("/dev/shm").glob("psm_*"), *Path("/dev/shm").glob("sem.mp-*")}


def test_what_vllm_loads_is_made_once(place):
    made_of = json.loads((place / "mine-hf" / "made_of.json").read_text())
    assert set(made_of) == {"weights"} and (place / "mine-hf" / "model.safetensors").is_file()
