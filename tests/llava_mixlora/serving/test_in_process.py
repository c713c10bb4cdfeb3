"""Who is answered together by the engine in this process."""

import asyncio
import socket
import threading
import time

import pytest

from llava_mixlora.serving.chat import Sampling
from llava_mixlora.serving.in_process import InProcess, Served, _Job
from llava_mixlora.serving.serve import _listen

SERVED = Served(prompts=object(), adapter=None, about={})


@pytest.fixture
def engine():
    return InProcess({"mine": SERVED}, batch_size=4)


def ask(engine, number=1, served=SERVED):
    loop = asyncio.new_event_loop()
    with engine._changed:
        for _ in range(number):
            engine._waiting.append(_Job(served, None, Sampling(), 1, (), False, loop))
        engine._changed.notify()
    loop.close()


def next_batch(engine):
    found = []
    thread = threading.Thread(target=lambda: found.extend(engine._next_batch()), daemon=True)
    thread.start()
    return thread, found


def test_the_next_batch_waits_a_moment_for_those_who_have_just_been_answered(engine):
    engine._asking, engine._begins_by = 3, time.monotonic() + 60
    ask(engine, 2)
    thread, found = next_batch(engine)
    thread.join(0.2)
    assert thread.is_alive()
    ask(engine)
    thread.join(10)
    assert len(found) == 3


@pytest.mark.parametrize("asking, begins_in", [(1, 60), (9, -1), (9, 0.05)], ids=["all there", "late", "a moment"])
def test_it_waits_for_nobody_who_does_not_come(engine, asking, begins_in):
    engine._asking, engine._begins_by = asking, time.monotonic() + begins_in
    ask(engine, 2)
    thread, found = next_batch(engine)
    thread.join(10)
    assert len(found) == 2


def test_a_full_batch_waits_for_nobody(engine):
    engine._asking, engine._begins_by = 9, time.monotonic() + 60
    ask(engine, 5)
    assert len(engine._next_batch()) == 4 and len(engine._waiting) == 1


def test_other_models_wait_for_a_batch_of_their_own(engine):
    ask(engine, 2)
    ask(engine, 1, Served(prompts=object(), adapter=None, about={}))
    assert [len(engine._next_batch()) for _ in range(2)] == [2, 1]


def test_pieces_of_a_stream_are_sent_at_once():
    with _listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP  # by which asyncio knows that it may say so
