"""Requests per second and time to the first token: upstream's worker, and `llava-mixlora serve` by its engines.

    python -m playground.benchmarks.benchmark serve [--engine-python PYTHON] [--merged FOLDER]

After the main job (`bash scripts/finetune_mixlora.sh`). Every server is started with its defaults, but for how many it
answers at a time, and stays; then they take turns: held-out questions, so many at a time, each with its picture, the
answers as streams. `--engine-python` names the python of an environment that has vLLM, whose server then answers with
the LoRA of each prompt, and with `--merged` also with the adapter merged into its base, which is another model. Medians
over rounds, ratios to upstream's worker within a round; answers are compared with `llava-mixlora eval`'s.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from typing import Any

import httpx
import torch
from tqdm import tqdm

from llava_mixlora import MixLoraError
from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import Question, read_questions
from llava_mixlora.inference.conversation import conversation_of
from llava_mixlora.inference.loading import load_for_inference
from playground import PLAYGROUND
from playground.answers import CONVERSATION, LONGEST_ANSWER
from playground.atomic import write_json
from playground.data.main_job import HELDOUT
from playground.embedded_default import IMAGES
from playground.measuring import machine

WORKER, IN_PROCESS, VLLM, MERGED = "upstream's worker", "transformers", "vllm", "vllm, merged"
AT_A_TIME = (1, 8, 32)
ONE_GPU = "--gpu-memory-utilization 0.3"
"""What each vLLM takes of a GPU that others use too."""
START = 1800.0
PROBE = 1.0
STOP_WORD = "</s>"


@dataclass(frozen=True)
class Answered:
    """One answer: its text, and seconds from the request to the first of it."""

    text: str
    first: float


@dataclass(frozen=True)
class Asked:
    """One question with its picture, as each kind of server is told it."""

    question: str
    image: str
    prompt: str


Ask = Callable[[Asked], Answered]


def add_arguments(commands: Any) -> None:
    """Add the command `serve` to argparse's `commands`."""
    command = commands.add_parser(
        "serve",
        help="requests per second of upstream's worker and of llava-mixlora serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    adapter = PLAYGROUND / "output" / "llava-v1-tiny-mixlora"
    command.add_argument("--model", type=Path, default=adapter, help="adapter (default: the embedded one)")
    command.add_argument(
        "--data", type=Path, default=PLAYGROUND / "cache" / "data", help="folder of the held-out questions"
    )
    command.add_argument("--engine-python", metavar="PYTHON", help="of an environment with vLLM (default: no vLLM)")
    command.add_argument("--engine-flags", metavar="FLAGS", help=f"for vLLM (default: on a GPU {ONE_GPU})")
    command.add_argument("--merged", type=Path, metavar="FOLDER", help="the adapter, merged (default: none)")
    command.add_argument("--at-a-time", type=int, nargs="+", default=AT_A_TIME, help="(default: 1 8 32)")
    command.add_argument("--per-task", type=int, default=4, help="questions of each task (default: 4)")
    command.add_argument("--rounds", type=int, default=5, help="turns after one to warm up (default: 5)")
    command.add_argument("--output", type=Path, help="JSON to write (default: playground/results/serving_DEVICE.json)")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Start the servers, let them take turns, and write and print what was measured.

    Raises:
        MixLoraError: a server does not start or refuses a question, or a flag's value cannot be.
    """
    if given.merged is not None and given.engine_python is None:
        raise MixLoraError(f"--merged {given.merged}: it is served by vLLM; say --engine-python PYTHON too")
    if given.merged is not None and not given.merged.is_dir():
        raise MixLoraError(f"--merged {given.merged}: no such folder; llava-mixlora merge makes one of an adapter")
    if given.engine_python is not None and shutil.which(given.engine_python) is None:
        raise MixLoraError(f"--engine-python {given.engine_python}: no such program; expected a python with vLLM")
    if min(given.at_a_time) < 1 or given.rounds < 1:
        raise MixLoraError("--at-a-time and --rounds: expected whole numbers of at least 1")
    output = given.output or results_file("gpu" if torch.cuda.is_available() else "cpu")
    questions = read_questions(given.data / HELDOUT, given.data / IMAGES, limit=given.per_task)
    conversation = conversation_of(str(given.model), None, "--version", otherwise=CONVERSATION)
    expected = _of_eval(given.model, questions, conversation)
    asked = [_asked(question, conversation) for question in questions]
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(start) for name, start in _servers(given, conversation).items()}
        rows = compare(servers, asked, expected, given.at_a_time, given.rounds)
    found = {"machine": machine(), "questions": len(asked), "rounds": given.rounds, "results": rows}
    write_json(output, found)
    print(f"\n{markdown(found)}\n\nwritten to {output}")


def show() -> None:
    """Print the stored figures as Markdown."""
    for device in ("cpu", "gpu"):
        if (file := results_file(device)).is_file():
            print(f"\n{markdown(json.loads(file.read_text(encoding='utf-8')))}\n")


def results_file(device: str) -> Path:
    """Where the figures of a kind of device are kept."""
    return PLAYGROUND / "results" / f"serving_{device}.json"


def compare(
    servers: dict[str, Ask],
    asked: Sequence[Asked],
    expected: Sequence[str],
    at_a_time: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each server and number at a time, of servers that take turns, in an order that turns too."""
    rates: dict[tuple[str, int], list[float]] = {}
    firsts: dict[tuple[str, int], list[float]] = {}
    same: dict[tuple[str, int], int] = {}
    names = list(servers)
    with tqdm(total=(1 + rounds) * len(at_a_time) * len(names), desc="serving", unit="run") as bar:
        for turn in range(1 + rounds):
            for number in at_a_time:
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    began = time.perf_counter()
                    with ThreadPoolExecutor(number) as pool:
                        answers = list(pool.map(servers[name], asked))
                    taken = time.perf_counter() - began
                    if turn > 0:
                        rates.setdefault((name, number), []).append(len(asked) / taken)
                        firsts.setdefault((name, number), []).extend(each.first for each in answers)
                        equal = sum(each.text == text for each, text in zip(answers, expected))
                        same[name, number] = min(equal, same.get((name, number), len(asked)))
                    bar.update()
    return [
        {
            "server": name,
            "at_a_time": number,
            "requests_per_second": round(statistics.median(of_it), 2),
            "ratio": round(statistics.median(map(truediv, of_it, rates[WORKER, number])), 2),
            "first_token_milliseconds": round(1000 * statistics.median(firsts[name, number])),
            "same_answers": same[name, number],
        }
        for (name, number), of_it in sorted(rates.items(), key=lambda each: (names.index(each[0][0]), each[0][1]))
    ]


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table, a line for each server."""
    numbers = sorted({row["at_a_time"] for row in found["results"]})
    by_server: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found["results"]:
        by_server.setdefault(row["server"], {})[row["at_a_time"]] = row
    lines = [
        f"| {found['questions']} questions | {' | '.join(f'{number} at a time' for number in numbers)} | as eval |",
        "| --- |" + " --- |" * (len(numbers) + 1),
    ]
    for server, of_it in by_server.items():
        cells = [_cell(of_it[number]) for number in numbers]
        same = min(row["same_answers"] for row in of_it.values())
        lines.append(f"| {server} | {' | '.join(cells)} | {same} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['requests_per_second']}/s ({row['ratio']}x), {row['first_token_milliseconds']} ms"


def _of_eval(model: Path, questions: list[Question], conversation: str) -> list[str]:
    batches = answer(load_for_inference(model), questions, conversation, 32, LONGEST_ANSWER, progress=False)
    return [text for _, answers in batches for text in answers]


def _asked(question: Question, conversation: str) -> Asked:
    from llava.conversation import conv_templates

    template = conv_templates[conversation].copy()
    template.append_message(template.roles[0], f"<image>\n{question.prompt}")
    template.append_message(template.roles[1], None)
    image = base64.b64encode(question.image.read_bytes()).decode()
    return Asked(question.prompt, image, template.get_prompt())


def _servers(given: argparse.Namespace, conversation: str) -> dict[str, contextlib.AbstractContextManager[Ask]]:
    serve = ["serve", "--port", "0", "--batch-size", str(max(given.at_a_time)), "--version", conversation]
    found = {WORKER: _worker(given.model), IN_PROCESS: _serve([*serve, f"mixlora={given.model}"])}
    if given.engine_python is not None:
        flags = given.engine_flags
        flags = flags if flags is not None else ONE_GPU if torch.cuda.is_available() else ""
        engine = ["--engine", "vllm", "--engine-python", given.engine_python, f"--engine-flags={flags}"]
        found[VLLM] = _serve([*serve, *engine, f"mixlora={given.model}"])
        if given.merged is not None:
            found[MERGED] = _serve([*serve, *engine, f"mixlora={given.merged}"])
    return found


@contextlib.contextmanager
def _worker(model: Path) -> Iterator[Ask]:
    """Upstream's model worker, without a controller, which only tells where it is."""
    address = f"http://127.0.0.1:{_free_port()}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = ["run", "-m", "llava.serve.model_worker", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    words += ["--worker-address", address, "--no-register", "--device", device, "--model-path", str(model)]
    with _process(words) as (process, log), _client(address) as client:
        until = time.monotonic() + START
        while True:
            with contextlib.suppress(httpx.HTTPError):
                client.post("/worker_get_status")
                break
            if process.poll() is not None or time.monotonic() > until:
                raise _not_started(words, log)
            time.sleep(PROBE)
        yield lambda asked: _ask_worker(client, asked)


@contextlib.contextmanager
def _serve(words: list[str]) -> Iterator[Ask]:
    with _process(words, output=subprocess.PIPE) as (process, log):
        line = next((line for line in process.stdout if line.startswith("Serving ")), None)
        if line is None:
            raise _not_started(words, log)
        with _client(line.split(" at ")[1].split()[0].removesuffix("/v1")) as client:
            yield lambda asked: _ask_serve(client, asked)


@contextlib.contextmanager
def _process(words: list[str], output: int | None = None) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    with tempfile.TemporaryDirectory() as folder:  # upstream's worker logs into the current one
        log = Path(folder) / "log"
        print(f"starting llava-mixlora {' '.join(words)}", flush=True)
        with log.open("w") as file:
            command = [sys.executable, "-m", "llava_mixlora", *_absolute(words)]
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output or file, stderr=file, text=True
            )
        try:
            yield process, log
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.communicate()


def _absolute(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        name, equals, path = word.rpartition("=")
        is_place = not word.startswith("-") and Path(path).exists()
        yield f"{name}{equals}{Path(path).absolute()}" if is_place else word


def _not_started(words: Sequence[str], log: Path) -> MixLoraError:
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return MixLoraError(f"llava-mixlora {' '.join(words)} did not start: {said[-1] if said else 'it said nothing'}")


def _client(address: str) -> httpx.Client:
    # Upstream's worker closes a connection that was idle for five seconds, which another server's turn may take.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    return httpx.Client(base_url=address, timeout=600, limits=limits)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ask_worker(client: httpx.Client, asked: Asked) -> Answered:
    body = {
        "prompt": asked.prompt,
        "images": [asked.image],
        "model": "mixlora",
        "temperature": 0,
        "max_new_tokens": LONGEST_ANSWER,
        "stop": STOP_WORD,
    }
    began, first, text, left = time.perf_counter(), None, "", b""
    with client.stream("POST", "/worker_generate_stream", json=body) as response:
        for content in response.iter_raw():
            *chunks, left = (left + content).split(b"\0")
            for chunk in chunks:
                told = json.loads(chunk)
                if told["error_code"]:
                    raise MixLoraError(f"upstream's worker refuses {asked.question!r}: {told['text'][:300]}")
                text = told["text"].removeprefix(asked.prompt).strip()
                if text and first is None:
                    first = time.perf_counter() - began
    return Answered(text, first if first is not None else time.perf_counter() - began)


def _ask_serve(client: httpx.Client, asked: Asked) -> Answered:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{asked.image}"}}
    content = [picture, {"type": "text", "text": asked.question}]
    body = {
        "model": "mixlora",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": LONGEST_ANSWER,
        "temperature": 0,
        "stream": True,
    }
    began, first, text = time.perf_counter(), None, ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise MixLoraError(f"the server refuses {asked.question!r}: {response.text[:300]}")
        for line in response.iter_lines():
            told = line.removeprefix("data: ")
            if told in (line, "[DONE]"):
                continue
            for choice in json.loads(told)["choices"]:
                text += choice["delta"].get("content") or ""
                if text and first is None:
                    first = time.perf_counter() - began
    return Answered(text, first if first is not None else time.perf_counter() - began)
