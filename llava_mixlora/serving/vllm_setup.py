"""What vLLM needs before it serves adapters: their base as transformers' LLaVA, flags, and who routes prompts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.adapter_folder import is_adapter, weights_of
from ..adapters.model_choices import ModelChoices
from ..adapters.model_places import adapter_of
from ..adapters.stored_weights import weight_files
from ..errors import MixLoraError
from ..inputs import expanded, read_json
from ..method.config import MixLoraConfig
from ..native.export import export_hf
from .in_process import InProcess, Served
from .prompt_loras import lora_of_nothing
from .served_models import NamedModel, load_served
from .shelf import Keeper, Shelf
from .vllm_engine import Elsewhere, Place, Routed, VllmEngine
from .vllm_process import VllmProcess

FLAG = "--engine-model"
KEY_VARIABLE = "LLAVA_MIXLORA_ENGINE_KEY"
"""Of the environment: what a vLLM that somebody else runs wants to hear as its API key."""
MADE_OF = "made_of.json"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM takes."""
OURS = ("--host", "--port", "--uds", "--api-key", "--model", "--root-path", "--ssl-keyfile", "--ssl-certfile")
"""vLLM's flags that are known here."""
APART = {
    "--api-server-count": "1",
    "-asc": "1",
    "--headless": None,
    "--data-parallel-rank": None,
    "--data-parallel-external-lb": None,
    "--data-parallel-hybrid-lb": None,
    "--data-parallel-multi-port-external-lb": None,
}
"""Those that begin several API servers, or none, and the value that does not."""
CPU_FLAGS = ("--enforce-eager", "--dtype", "float32")
"""Without a GPU: nothing is compiled, and answers are those of the models in this process."""


@dataclass(frozen=True)
class EngineOptions:
    """What the command says of the engine.

    `url`: of a vLLM that runs; None for one of ours, of the environment of `python`, with further `flags`. `folder`:
    for what vLLM loads; `lora_folder`: for the LoRAs of prompts, in memory where it is None. `at_a_time`: requests;
    `longest`: tokens of an answer; `images`: in a conversation.
    """

    url: str | None
    python: str
    folder: str | None
    lora_folder: str | None
    flags: Sequence[str]
    at_a_time: int
    longest: int
    images: int


def vllm_engine(
    models: Sequence[NamedModel],
    model_base: str | None,
    version: str | None,
    choices: ModelChoices,
    options: EngineOptions,
    stack: contextlib.ExitStack,
) -> tuple[VllmEngine, bool]:
    """The engine, and whether its models pad pictures to squares.

    `stack`: clears up when it is closed.

    Raises:
        MixLoraError: vLLM is not there, the models are of several bases, or one cannot be exported.
    """
    adapters = [model for model in models if is_adapter(adapter_of(model.path))]
    if len(models) > 1 and len(adapters) < len(models):
        whole = next(model for model in models if model not in adapters)
        raise MixLoraError(
            f"{whole.path} is a whole model: a vLLM serves one, and adapters of one; serve it by a server of its own"
        )
    check_flags(options.flags, options.url)
    if options.url is None:
        _check_vllm(options.python)
    served = dict(load_served(adapters, model_base, 16, version, choices))
    _check_one_base(adapters, served)
    for model in adapters:
        _check_has_loras(model, served[model.name])
    folder = None if options.url is not None else _exported(models[0], model_base, version, choices, options.folder)
    keeper = Keeper()
    stack.callback(keeper.close)
    shelf = Shelf(keeper, None if options.lora_folder is None else expanded(options.lora_folder))
    place: Place = Elsewhere(options.url, os.environ.get(KEY_VARIABLE)) if options.url is not None else None
    if place is None:
        log = Path(tempfile.mkdtemp(prefix="llava-mixlora-vllm-")) / "vllm.log"
        keeper.say(f"keep {log.parent}")
        ranks = [_largest_rank(each) for each in _routed(served).values()]
        place = VllmProcess(options.python, _flags(folder, ranks, options), keeper, log)
        print(f"Starting vLLM; it says how it goes in {log}", flush=True)
    names = {name: each.about for name, each in served.items()} or {models[0].name: {}}
    conversations = InProcess(served, options.at_a_time, options.longest) if served else None
    routed = {name: Routed(each.prompts, each.adapter) for name, each in _routed(served).items()}
    prompts = {name: each.prompts for name, each in served.items()}
    nothing = {}
    if not torch.cuda.is_available():
        nothing = {
            served[name].about["parent"]: lora_of_nothing(each.prompts, each.adapter) for name, each in routed.items()
        }
    engine = VllmEngine(
        place, names, routed, prompts, nothing, conversations, shelf, options.at_a_time, options.longest
    )
    return engine, any(each.prompts.padded for each in served.values())


def _routed(served: dict[str, Served]) -> dict[str, Served]:
    """The adapters, without the bases below them."""
    return {name: each for name, each in served.items() if "parent" in each.about}


def _largest_rank(served: Served) -> int:
    """Of an adapter's prompts' LoRAs."""
    config = served.prompts.loaded[1].peft_config[served.adapter]
    return max([config.r, *(config.rank_pattern or {}).values()])


def _check_vllm(python: str) -> None:
    found = shutil.which(python)
    if found is None:
        raise MixLoraError(
            f"--engine-python {python}: no such program; expected the python of an environment with vLLM"
        )
    ask = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    if subprocess.run([found, "-c", ask], capture_output=True).returncode:
        where = "this environment" if python == sys.executable else f"that of {python}"
        raise MixLoraError(
            f"--engine vllm: vLLM is not installed in {where}; it wants an environment of its own, whose python "
            "--engine-python names"
        )


def check_flags(flags: Sequence[str], url: str | None) -> None:
    """Refuse what somebody else's vLLM would have to be told, and what would hide LoRAs from requests.

    Raises:
        MixLoraError: a flag is among these.
    """
    if flags and url is not None:
        raise MixLoraError(f"--engine-flags: {url} runs already; give its flags to it, and leave them out")
    words = [word.replace("_", "-") for word in flags]
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        value = value or (words[number + 1] if number + 1 < len(words) else "")
        if name in APART and (APART[name] is None or value != APART[name]):
            raise MixLoraError(
                f"--engine-flags {name}: a prompt's LoRA is loaded by name into one of vLLM's API servers, and others "
                "would not know it; leave it out (one API server serves all engines of --data-parallel-size)"
            )
        if name in OURS:
            raise MixLoraError(f"--engine-flags {name}: it is this server's to say; leave it out")


def _check_has_loras(model: NamedModel, served: Served) -> None:
    """Refuse an adapter that is no plain LoRA for a prompt."""
    config = served.prompts.loaded[1].peft_config[served.adapter]
    if not isinstance(config, MixLoraConfig):
        raise MixLoraError(f"{model.path} is no MIXLORA adapter but {config.peft_type}; serve it by vLLM's own flags")
    if config.decode_routing != "prefill":
        raise MixLoraError(
            f"{model.path} routes every step of an answer anew (decode_routing={config.decode_routing!r}), so no LoRA "
            "is what it is for a prompt; serve it by --engine transformers"
        )


def _check_one_base(adapters: Sequence[NamedModel], served: dict[str, Served]) -> None:
    """Refuse adapters that are not all for one model with one projector: vLLM has one of each."""
    if not adapters:
        return
    first = adapters[0]
    conversation = served[first.name].about["conversation"]
    for other in adapters[1:]:
        if served[other.name].about["conversation"] != conversation:
            raise MixLoraError(
                f"{first.path} is asked as {conversation} and {other.path} as "
                f"{served[other.name].about['conversation']}, and a vLLM has one template; serve each by a server of "
                "its own, or all by --engine transformers"
            )
    of_first = _beside_layers(served[first.name])
    for other in adapters[1:]:
        of_other = _beside_layers(served[other.name])
        differing = next((name for name in of_first if not _same(of_first[name], of_other.get(name))), None)
        if differing is not None or of_first.keys() != of_other.keys():
            raise MixLoraError(
                f"{first.path} and {other.path} were trained with another {differing or 'model'} each (their "
                "projectors, mostly), and a vLLM has one; serve each by a server of its own, or all by --engine "
                "transformers"
            )


def _beside_layers(served: Served) -> dict[str, torch.Tensor]:
    model = served.prompts.loaded[1]
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.get_base_model().named_parameters()
        if "mixlora_" not in name
    }


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def _exported(
    model: NamedModel, model_base: str | None, version: str | None, choices: ModelChoices, named: str | None
) -> Path:
    """What vLLM loads: made once, and used again while it is of the same model."""
    source = Path(adapter_of(model.path))
    folder = expanded(named) if named is not None else source.absolute().with_name(f"{source.absolute().name}-hf")
    made_of = _weights(source)
    if (folder / "config.json").is_file():
        found = read_json(folder / MADE_OF).get("weights") if (folder / MADE_OF).is_file() else None
        if found is not None and found != made_of:
            raise MixLoraError(f"{FLAG} {folder} was made of another model than {source}; remove it, or name another")
        return folder
    print(f"Writing {folder}, the model that vLLM loads (once; {FLAG} says another place)", flush=True)
    export_hf(str(source), folder, model_base if is_adapter(source) else None, version, choices)
    (folder / MADE_OF).write_text(json.dumps({"weights": made_of}) + "\n", encoding="utf-8")
    return folder


def _weights(folder: Path) -> str:
    """Of a folder's weights, the names, sizes and first and last bytes."""
    told = hashlib.sha256()
    for file in [weights_of(folder)] if is_adapter(folder) else weight_files(folder):
        size = file.stat().st_size
        told.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            told.update(content.read(1 << 20))
            content.seek(max(0, size - (1 << 20)))
            told.update(content.read())
    return told.hexdigest()


def _flags(folder: Path, ranks: Sequence[int], options: EngineOptions) -> list[str]:
    flags = ["--model", str(folder), "--limit-mm-per-prompt", json.dumps({"image": options.images})]
    flags += ["--disable-uvicorn-access-log"]  # three lines of each request, for ever
    if not ranks:  # nobody here counts a prompt's tokens, so vLLM has to fit an answer of no given length in
        flags += ["--override-generation-config", json.dumps({"max_new_tokens": options.longest})]
    if ranks:
        rank = next((each for each in RANKS if each >= max(ranks)), None)
        if rank is None:
            raise MixLoraError(
                f"an adapter chooses {max(ranks)} factors, and vLLM takes LoRAs of rank {RANKS[-1]} at most"
            )
        flags += ["--enable-lora", "--max-lora-rank", str(rank)]
        flags += ["--max-loras", str(options.at_a_time), "--max-cpu-loras", str(2 * options.at_a_time)]
    if not torch.cuda.is_available():
        flags += CPU_FLAGS
    return [*flags, *options.flags]
