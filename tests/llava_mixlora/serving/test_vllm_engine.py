"""Asking vLLM, by a stand-in that answers as it does: each LoRA is gone after its request, however that ended."""

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from llava_mixlora.adapters.model_choices import AS_NAMED
from llava_mixlora.serving.chat import ChatRequest, Message
from llava_mixlora.serving.prompt_loras import lora_of_nothing
from llava_mixlora.serving.request_error import RequestError
from llava_mixlora.serving.served_models import NamedModel, load_served
from llava_mixlora.serving.shelf import Keeper, Shelf
from llava_mixlora.serving.vllm_engine import Elsewhere, Routed, VllmEngine

from ...tiny import write_adapter


class StandIn:
    """vLLM's paths; `words` are what it says, and a test may set how it fails."""

    def __init__(self):
        self.words, self.loras, self.ever, self.asked = ["  a red", " ", "circle ", "\n"], {}, [], []
        self.tensors = []
        self.load_seconds = self.unload_seconds = self.failed_unloads = 0
        self.load_status = self.chat_status = 200
        self.message = self.event = None
        self.models = [{"id": "/own", "max_model_len": 4096, "parent": None}]

    def app(self):
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, StreamingResponse
        from starlette.routing import Route

        def refused(status):
            return JSONResponse({"error": {"message": self.message or "no", "code": status}}, status_code=status)

        async def models(_):
            return JSONResponse({"data": self.models})

        async def load(request):
            told = await request.json()
            if self.load_status != 200:
                return refused(self.load_status)
            self.tensors.append(load_file(Path(told["lora_path"], "adapter_model.safetensors")))
            await asyncio.sleep(self.load_seconds)
            self.ever.append(told["lora_name"])
            self.loras[told["lora_name"]] = told["lora_path"]
            return JSONResponse("loaded")

        async def unload(request):
            await asyncio.sleep(self.unload_seconds)
            if self.failed_unloads:
                self.failed_unloads -= 1
                return refused(500)
            found = self.loras.pop((await request.json())["lora_name"], None)
            return JSONResponse("unloaded") if found else refused(404)

        async def chat(request):
            self.asked.append(await request.json())
            if self.chat_status != 200:
                return refused(self.chat_status)
            return StreamingResponse(self.events(), media_type="text/event-stream")

        paths = {"/v1/load_lora_adapter": load, "/v1/unload_lora_adapter": unload, "/v1/chat/completions": chat}
        return Starlette(
            routes=[Route("/v1/models", models), *(Route(path, do, methods=["POST"]) for path, do in paths.items())]
        )

    async def events(self):
        for word in self.words:
            yield f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}\n\n"
            await asyncio.sleep(0.01)
        if self.event is not None:
            yield f"data: {json.dumps(self.event)}\n\n"
        yield f"data: {json.dumps({'choices': [{'delta': {}, 'finish_reason': 'length'}]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 9, 'completion_tokens': 4}})}\n\n"
        yield "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory, llava_folder):
    folder = tmp_path_factory.mktemp("vllm") / "mine"
    write_adapter(llava_folder, folder, pairing="same", router_scope="instruction", router_input="words")
    return dict(load_served([NamedModel("mine", str(folder))], None, 16, "v1", AS_NAMED))


@pytest.fixture
def vllm():
    import uvicorn

    stand_in = StandIn()
    listening = socket.create_server(("127.0.0.1", 0))
    stand_in.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(stand_in.app(), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield stand_in
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def shelf(tmp_path):
    keeper = Keeper()
    yield Shelf(keeper, tmp_path)
    keeper.close()


@pytest.fixture
def asking(served, vllm, shelf):
    """Runs a test's coroutine function of the engine; then nothing is left anywhere."""

    def run(test):
        async def within():
            routed = {"mine": Routed(served["mine"].prompts, served["mine"].adapter)}
            prompts = {name: each.prompts for name, each in served.items()}
            models = {**{name: each.about for name, each in served.items()}, "whole": {}}
            nothing = {"mine:base": lora_of_nothing(served["mine"].prompts, served["mine"].adapter)}
            engine = VllmEngine(Elsewhere(vllm.url), models, routed, prompts, nothing, None, shelf, 4, 50)
            await engine.start()
            try:
                return await test(engine)
            finally:
                await engine.close()

        result = asyncio.run(within())
        assert not vllm.loras and not (shelf.folder.exists() and len(shelf))
        return result

    return run


def question(text="what color is the shape?", model="mine", **options):
    return ChatRequest(model, (Message("user", text),), **options)


async def pieces_of(engine, request):
    return [piece async for piece in engine.answer(request)]


def refusal(asking, request=None):
    async def test(engine):
        with pytest.raises(RequestError) as error:
            await pieces_of(engine, request or question())
        return error.value

    found = asking(test)
    assert "\n" not in found.message
    return found


def test_answer_is_of_the_prompts_lora_without_blanks_around_it(asking, vllm):
    pieces = asking(lambda engine: pieces_of(engine, question(wants_routes=True)))
    assert "".join(piece.text for piece in pieces) == "a red circle"
    last = pieces[-1]
    assert (last.finish, last.usage.prompt, last.usage.answer, len(last.routes)) == ("length", 9, 4, 14)
    assert [each["model"] for each in vllm.asked] == vllm.ever and len(vllm.ever) == 1


def test_whole_models_are_vllms_own_and_their_answers_as_long_as_it_says(asking, vllm):
    asking(lambda engine: pieces_of(engine, question(model="whole")))
    assert not vllm.ever and [(each["model"], each["max_tokens"]) for each in vllm.asked] == [("/own", None)]


def test_base_is_vllms_own_or_asked_with_a_lora_that_changes_nothing(asking, vllm, served):
    asking(lambda engine: pieces_of(engine, question(model="mine:base")))
    (name,) = vllm.ever
    assert [(each["model"], each["max_tokens"]) for each in vllm.asked] == [(name, 50)]
    (tensors,) = vllm.tensors
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in tensors} == {"lora_A", "lora_B"}
    assert all(key.startswith("base_model.model.model.language_model.layers.0.") for key in tensors)
    assert not any(tensor.any() for tensor in tensors.values())

    async def without(engine):
        engine.nothing = {}
        return await pieces_of(engine, question(model="mine:base"))

    asking(without)
    assert vllm.ever == [name] and vllm.asked[-1]["model"] == "/own"


def test_answer_of_no_given_length_fits_the_context(asking, vllm, served):
    vllm.models[0]["max_model_len"] = length = served["mine"].prompts.prompt(question().messages).length + 7
    asking(lambda engine: pieces_of(engine, question()))
    assert [each["max_tokens"] for each in vllm.asked] == [7]
    refused = refusal(asking, question(max_tokens=8))
    assert refused.code == "context_length_exceeded" and f"the {length} of" in refused.message
    assert len(vllm.ever) == 1


@pytest.mark.parametrize(
    "status, message, expected, code",
    [
        (400, "the maximum context length is 5", 400, "context_length_exceeded"),
        (400, "bad\nimage", 400, None),
        (404, "the model does not exist", 503, None),
        (500, "EngineDeadError", 502, None),
        (401, "who?", 502, None),
    ],
)
def test_what_vllm_says_of_a_request_is_told(asking, vllm, status, message, expected, code):
    vllm.chat_status, vllm.message = status, message
    refused = refusal(asking)
    assert (refused.status, refused.code) == (expected, code) and message.split()[-1] in refused.message
    assert len(vllm.ever) == 1


def test_answer_that_breaks_off_is_no_answer(asking, vllm):
    vllm.event = {"error": {"message": "out of memory"}}
    refused = refusal(asking)
    assert refused.status == 503 and "out of memory" in refused.message


@pytest.mark.parametrize("status", [400, 404, 500])
def test_lora_that_is_not_loaded_is_not_the_requests_fault(asking, vllm, status):
    vllm.load_status, vllm.message = status, "No adapter found for /there"
    refused = refusal(asking)
    assert refused.status == 502 and "No adapter found for /there" in refused.message and not vllm.asked


def test_engine_that_is_gone_is_503(asking, vllm, shelf):
    async def test(engine):
        await pieces_of(engine, question())
        with socket.create_server(("127.0.0.1", 0)) as free:
            engine._client.base_url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RequestError) as error:
            await pieces_of(engine, question())
        return error.value

    refused = asking(test)
    assert refused.status == 503 and "try again" in refused.message and len(vllm.ever) == 1


def test_what_is_no_vllm_is_named(asking, vllm):
    for models in ([], [{"name": "x"}], "x"):
        vllm.models = models
        refused = refusal(asking)
        assert refused.status == 502 and f"{vllm.url} is no vLLM" in refused.message


@pytest.mark.parametrize("seconds", [(0.0,), (0.1,), (0.1, 0.35)])
def test_who_leaves_while_a_lora_is_loaded_leaves_none(asking, vllm, seconds):
    """Before it is written, and while vLLM reads it, which goes on when nobody waits for it; told so once, or twice."""
    vllm.load_seconds, vllm.unload_seconds = 0.4, 0.1

    async def test(engine):
        asked = asyncio.ensure_future(pieces_of(engine, question()))
        until = time.monotonic() + 10
        while not len(engine.shelf):
            assert time.monotonic() < until
            await asyncio.sleep(0.001)
        for pause in seconds:
            await asyncio.sleep(pause)
            asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked

    asking(test)
    assert len(vllm.ever) == 1 and not vllm.asked


def test_who_leaves_in_mid_answer_leaves_no_lora(asking, vllm):
    async def test(engine):
        pieces = engine.answer(question())
        assert (await anext(pieces)).text == "a red"
        assert len(vllm.loras) == 1
        await pieces.aclose()

    asking(test)


def test_unload_that_fails_is_asked_for_again(asking, vllm):
    vllm.failed_unloads = 1
    asking(lambda engine: pieces_of(engine, question()))
    assert len(vllm.ever) == 1


def test_lora_that_cannot_be_written_is_told_with_what_to_do(asking, shelf):
    shutil.rmtree(shelf.folder)
    refused = refusal(asking)
    assert refused.status == 503 and "--lora-folder" in refused.message
