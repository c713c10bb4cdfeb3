"""What the patches of upstream's model worker do to its parts; the worker itself runs in the end-to-end tests."""

import asyncio
import functools
import threading
import time

import pytest
from fastapi import BackgroundTasks
from llava_mixlora.patches.llava_model_worker import PATCHES, AnswerStream
from transformers import AutoTokenizer, TextIteratorStreamer

from llava_mixlora.limits import VARIABLE

from ..tiny import random_ids

TOKENS = 40


@pytest.fixture
def stream(tokenizer_folder):
    """The patched streamer, in front of a real tokenizer."""
    patched = PATCHES[0].replace(TextIteratorStreamer)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)
    return patched(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=0.2)


def start(generate, **kwargs):
    thread = PATCHES[1].replace(threading.Thread)(target=generate, kwargs=kwargs)
    thread.start()
    return thread


def options(stream):
    return {"inputs": random_ids(1, 4), "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "streamer": stream}


def test_reader_gets_the_whole_answer(llama, stream):
    thread = start(llama.generate, **options(stream), do_sample=False)
    text = "".join(stream)
    thread.join(10)
    expected = llama.generate(random_ids(1, 4), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    assert text == stream.tokenizer.decode(expected[0, 4:], skip_special_tokens=True)


def test_slow_token_is_waited_for(llama, stream):
    """The worker asks for a time limit, here 0.2 seconds."""
    hook = llama.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    thread = start(llama.generate, **{**options(stream), "max_new_tokens": 2, "min_new_tokens": 2})
    assert list(stream)
    thread.join(10)
    hook.remove()


def test_failure_of_the_generation_reaches_the_reader_at_once(llama, stream):
    start(llama.generate, **{**options(stream), "temperature": "warm", "do_sample": True})
    with pytest.raises(Exception, match="temperature|warm"):
        list(stream)


def test_generation_ends_when_its_reader_leaves(llama, stream):
    steps, read = [], threading.Event()

    def before_each_step(*_):
        steps.append(1)
        if len(steps) == 3:
            read.wait(10)  # or it would be done before the reader leaves

    hook = llama.register_forward_pre_hook(before_each_step)
    thread = start(llama.generate, **options(stream))
    reader = iter(stream)
    next(reader)
    reader.close()
    read.set()
    thread.join(10)
    hook.remove()
    assert not thread.is_alive() and len(steps) < 5


def test_place_is_released_where_its_waiters_are():
    """In debug mode, asyncio refuses what is done to its loop from another thread."""
    (patch,) = [patch for patch in PATCHES if patch.target.endswith(":release_model_semaphore")]

    async def leave_and_enter():
        places, told = asyncio.Semaphore(1), []

        def release_model_semaphore(fn=None):
            places.release()
            fn()

        await places.acquire()
        waiting = asyncio.create_task(places.acquire())
        await asyncio.sleep(0)
        tasks = BackgroundTasks()
        tasks.add_task(functools.partial(patch.replace(release_model_semaphore), fn=lambda: told.append(True)))
        await tasks()
        assert await asyncio.wait_for(waiting, 5) and told == [True]

    asyncio.run(leave_and_enter(), debug=True)


def test_prompt_that_would_hold_up_the_others_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "prompt_letters=10")
    check = next(patch.replace for patch in PATCHES if patch.target.endswith("generate_stream"))
    generate = check(lambda worker, params: iter([b"answer"]))
    assert list(generate(None, {"prompt": "0123456789"})) == [b"answer"]
    with pytest.raises(ValueError, match="a prompt of 11 letters, more than 10"):
        list(generate(None, {"prompt": "0123456789?"}))


def test_stream_is_still_a_streamer_of_transformers(stream):
    assert isinstance(stream, AnswerStream) and isinstance(stream, TextIteratorStreamer)
