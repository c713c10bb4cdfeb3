"""vLLM's process, by a program that stands in for it: what happens when it ends too early, once or always."""

import asyncio
import sys
import textwrap

import pytest

pytest.importorskip("httpx", reason="httpx is not installed")

from llava_mixlora.errors import MixLoraError
from llava_mixlora.serving.request_error import RequestError
from llava_mixlora.serving.shelf import Keeper
from llava_mixlora.serving.vllm_process import VllmProcess

pytestmark = pytest.mark.slow
PROGRAM = """\
#!{python}
import os, sys, threading
lives = {lives}  # of each beginning the seconds; 0: it does not come up; None: it stays
with open({begun!r}, "a") as begun:
    begun.write("x")
number = os.path.getsize({begun!r})
life = lives[min(number, len(lives)) - 1]
print("a line of beginning", number, flush=True)
if life == 0:
    print("ValueError: no room", file=sys.stderr)
    sys.exit(3)
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
if life is not None:
    threading.Timer(life, os._exit, [1]).start()
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


@pytest.fixture
def process(tmp_path):
    """Makes one that lives as long as is said, at each beginning."""
    keeper = Keeper()

    def made(*lives):
        program, begun = tmp_path / "python", tmp_path / "begun"
        program.write_text(textwrap.dedent(PROGRAM.format(python=sys.executable, lives=lives, begun=str(begun))))
        program.chmod(0o700)
        return VllmProcess(str(program), [], keeper, tmp_path / "log"), begun

    yield made
    keeper.close()


async def until(condition):
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it has not come to that")


def test_engine_that_does_not_start_ends_with_its_last_lines(process):
    engine, begun = process(0)
    with pytest.raises(MixLoraError, match="a line of beginning 1 | ValueError: no room") as error:
        asyncio.run(engine.start())
    assert str(engine.log) in str(error.value) and begun.read_text() == "x"


def test_engine_that_ends_is_begun_again_also_where_one_beginning_fails(process):
    engine, begun = process(0.5, 0, None)

    async def run():
        await engine.start()
        await until(lambda: engine.problem is not None)
        with pytest.raises(RequestError, match="is starting again; try again") as error:
            engine.check_is_there()
        assert error.value.status == 503
        await until(lambda: engine.problem is None)
        engine.check_is_there()
        await engine.close()

    asyncio.run(run())
    assert begun.read_text() == "xxx"


def test_engine_that_always_ends_at_once_is_given_up(process):
    engine, begun = process(0.4)

    async def run():
        await engine.start()
        await until(lambda: "does not start again" in (engine.problem or ""))
        with pytest.raises(RequestError, match="log") as error:
            engine.check_is_there()
        assert error.value.status == 503
        await engine.close()

    asyncio.run(run())
    assert begun.read_text() == "xxx"
