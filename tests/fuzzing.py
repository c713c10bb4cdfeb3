"""Damaged and hostile files, made by hypothesis, and the bounds within which each of them has to be answered.

A damage is a tuple of plain values, so a failing case can be typed in again: `damaged(folder, damage)`.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_mixlora import MixLoraError

SHORT = 200
"""Cases of an ordinary run, of all kinds together; MIXLORA_FUZZ_CASES asks for others, such as 2000."""
SECONDS = 5
MEMORY = 400 << 20  # bytes of address space that a case may take beyond what the process has
Damage = tuple[Any, ...]


def cases(share: float) -> settings:
    """Hypothesis' settings for a test that has this share of all cases: the same ones in each run."""
    number = max(1, round(share * int(os.environ.get("MIXLORA_FUZZ_CASES", SHORT))))
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a fault is counted, and the others are looked for; a damage is small as it is
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """A case was not answered in time; no `except Exception` takes it for something else."""


@dataclass
class Counts:
    """What has become of the cases of one kind. `faults`: the first case of each, by what went wrong."""

    kind: str
    cases: int = 0
    one_line: int = 0
    accepted_and_right: int = 0
    tracebacks: int = 0
    hangs: int = 0
    untrue: int = 0
    faults: dict[str, str] = field(default_factory=dict)

    def run(self, case: Any, doors: Callable[[], None]) -> None:
        """Count one case. `doors`: reads it, and raises an AssertionError where what it was given is not right."""
        self.cases += 1
        try:
            with bounded():
                doors()
        except MixLoraError as error:
            if len(str(error).splitlines()) == 1:
                self.one_line += 1
            else:
                self._fault("untrue", f"more than one line: {str(error)[:200]!r}", case)
        except Hang:
            self._fault("hangs", _place(), case)
        except AssertionError as error:
            self._fault("untrue", f"not right: {str(error).splitlines()[0] if str(error) else ''} {_place()}", case)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._fault("tracebacks", f"{type(error).__name__} {_place()} ({str(error)[:200]})", case)
        else:
            self.accepted_and_right += 1

    def _fault(self, kind: str, what: str, case: Any) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.faults.setdefault(f"{kind}: {what.partition(' (')[0]}", f"{what} {case!r:.600}")

    def __str__(self) -> str:
        return (
            f"{self.kind:<12}{self.cases:>6} cases{self.one_line:>6} one line{self.accepted_and_right:>6} accepted and "
            f"right{self.untrue:>4} untrue{self.tracebacks:>4} tracebacks{self.hangs:>4} hangs"
        )

    def check(self) -> None:
        """Fail where one of the cases has."""
        told = "\n".join(f"{what}\n    {case}" for what, case in self.faults.items())
        assert not self.faults, f"{self}\n{told}"


def _place() -> str:
    """Where in the plugin the exception that is being handled was raised, or, if it was not there, its last lines."""
    import sys

    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [frame for frame in frames if "llava_mixlora" in frame.filename or "/patches/" in frame.filename]
    shown = [*own[-1:], *frames[-1:]]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(shown))


@contextmanager
def bounded() -> Iterator[None]:
    """End the body after [`SECONDS`], and let it take no more than [`MEMORY`]."""

    def ring(*_: Any) -> None:
        raise Hang

    usual, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, ring)
    if (size := _address_space()) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, usual[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, usual)


def _address_space() -> int | None:
    with suppress(OSError):  # of a system that is not Linux, where memory goes unbounded
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return None


# --- what damages are made of -----------------------------------------------------------------------------------------

LONG = {
    "deep list": "[" * 100_000 + "]" * 100_000,
    "rather deep list": "[" * 100 + "]" * 100,
    "deep object": '{"a":' * 100 + "1" + "}" * 100,
    "long text": '"' + "x" * 100_000 + '"',
    "long number": "9" * 5000,
    "long name": "x" * 10_000,
}
"""By the names that they have in a damage, what would make it unreadable."""
FRAGMENTS = (
    *LONG,
    *("null", "true", "false", "0", "1", "-1", "2", "3", "8", "0.5", "-0.0", "1e999", "NaN", "Infinity", "-Infinity"),
    *("10000000", "1000000000000", "1" * 400, "1e-320", '""', '" "', '"\\n"', '"\\u0000"', '"\\ud800"'),
    *('"a\\u2028b\\u0085c"', '"../../x"', '"/dev/zero"', '"~"', '"owner/name"', "[]", "{}", "[null]", '{"": null}'),
    *("[[]]", "[1]", "[0, 5]", "[1e9]", '["q_proj"]', '["lm_head"]', '["x\\ny"]', '{"q_proj": 1}', '{"(a+)+$": 1}'),
    *('{"x": "y"}', '{"q_proj": 2.5}', '{"a": {"b": {"c": []}}}', '"(a+)+$"', '"(.*)*x"'),
    *('".*"', '"["', '"all-linear"'),
    *('"ifs"', '"ifs_cfs"', '"random"', '"hidden"', '"words"', '"same"', '"rank"', '"prompt"', '"step"', '"table"'),
    *('"all"', '"mixlora_only"', '"lora_only"', '"LORA"', '"MIXLORA"', '"IA3"', '"SEQ_2_SEQ_LM"', '"llama"', '"mpt"'),
    *('"llava_llama"', '"identity"', '"linear"', '"mlp3x_gelu"', '"mlp99999x_gelu"', '"float16"', '"pad"', '"human"'),
    *('"gpt"', '"<image>"', '"0.png"', '["0.png"]', '["0.png", "1.png"]', '[{"from": "human", "value": 3}]'),
)
"""What stands in a JSON file in the place of a value, as text: not all of it is JSON."""
NAMES = (
    *("auto_map", "_attn_implementation", "quantization_config", "layers_to_transform", "layers_pattern", "bias"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "exclude_modules", "runtime_config", "num_factors", "tasks"),
    *("format_version", "format", "merged", "samples", "max_steps", "global_step", "num_train_epochs", "log_history"),
    *("stateful_callbacks", "files", "flags", "image", "messages", "conversations", "category", "label", "answer"),
    *(
        "head_dim",
        "num_key_value_heads",
        "rope_scaling",
        "dtype",
        "layer_types",
        "image_grid_pinpoints",
        "vision_config",
    ),
    *("mm_vision_tower", "x\ny", "", "\ud800", "long name", "constructor", "use_dora", "layer_replication"),
)
GARBAGE = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\x1f\x8b\x08\0",
    b"PK\x03\x04",
    b"\x80\x02",
    b"{",
    b"[",
    b"null",
    b"3",
    b'"x"',
    b"\n",
)
PLACES = st.integers(0, 400)
VALUES = st.sampled_from(FRAGMENTS) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
).map(json.dumps)
JSON_DAMAGES = st.one_of(
    st.tuples(st.just("set"), PLACES, VALUES),
    st.tuples(st.just("drop"), PLACES),
    st.tuples(st.just("add"), PLACES, st.sampled_from(NAMES) | st.text(max_size=8), VALUES),
    st.tuples(st.just("twice"), PLACES, VALUES),
    st.tuples(st.just("whole"), VALUES),
    st.tuples(st.just("encode"), st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "latin-1"])),
)
FILE_DAMAGES = st.one_of(
    st.tuples(st.just("remove")),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("cut after"), st.integers(0, 200)),
    st.tuples(st.just("bytes"), st.sampled_from(GARBAGE) | st.binary(max_size=64)),
    st.tuples(st.just("behind"), st.sampled_from(GARBAGE) | st.binary(max_size=64)),
    st.tuples(st.just("folder")),
    st.tuples(st.just("pipe")),
    st.tuples(st.just("link"), st.sampled_from(["outside", "itself", "nothing", "/dev/zero", "/dev/null", "inside"])),
    st.tuples(st.just("sparse"), st.sampled_from([1 << 26, 1 << 28])),
)
TENSOR_DAMAGES = st.one_of(
    st.tuples(st.just("drop"), PLACES),
    st.tuples(
        st.just("drop all of"), st.sampled_from(["router", "mixlora_A", "stats", "cfs", "layers.1", "lora_B", ""])
    ),
    st.tuples(
        st.just("extra"),
        st.sampled_from(
            [
                *(
                    "lm_head.weight",
                    "base_model.model.lm_head.weight",
                    "base_model.model.model.embed_tokens.weight",
                    "x",
                ),
                *(
                    "base_model.model.model.layers.7.mlp.up_proj.mixlora_A",
                    "base_model.model.model.norm.weight",
                    "x\ny",
                ),
                *("base_model.model.model.layers.0.mlp.up_proj.bias", "base_model.model.model.layers.0.mlp.up_proj.x"),
                *("base_model.model.model.mm_projector.4.weight", "model.mm_projector.0.weight", "", "mixlora_A"),
                *("base_model.model.model.vision_tower.vision_tower.x", "base_model.model.mixlora_words", "x\ny"),
                *("a" * 3000,),
            ]
        ),
        st.sampled_from([(), (0,), (1,), (32, 32), (2, 0)]),
    ),
    st.tuples(st.just("rename"), PLACES, st.sampled_from(["", "x", "base_model.model.x", "x\ny", "a" * 3000])),
    st.tuples(st.just("shape"), PLACES, st.sampled_from(["one less", "one more", "flat", "turned", "empty", "deeper"])),
    st.tuples(st.just("dtype"), PLACES, st.sampled_from(["float16", "bfloat16", "float64", "int8", "int64", "bool"])),
    st.tuples(st.just("number"), PLACES, st.sampled_from(["nan", "inf", "-inf"])),
)
HEADER_DAMAGES = st.one_of(
    st.tuples(st.just("header size"), st.sampled_from([0, 1, 7, 1 << 20, 1 << 40, (1 << 64) - 1])),
    st.tuples(st.just("header"), JSON_DAMAGES),
)
PICKLE_DAMAGES = st.one_of(
    st.tuples(st.just("code"), st.sampled_from(["value", "beside", "plain pickle", "old form", "name"])),
    st.tuples(
        st.just("content"), st.sampled_from(["list", "none", "numbers", "numbered", "nested", "expanded", "meta"])
    ),
    st.tuples(st.just("member"), st.sampled_from(["twice", "gone", "deflated", "script", "outside"])),
)


def in_file(name: str, *kinds: st.SearchStrategy[Damage]) -> st.SearchStrategy[Damage]:
    """Damages of one file of a folder; two thirds of them are of its own form (`kinds`)."""
    own = st.one_of(*kinds) if kinds else FILE_DAMAGES
    return st.tuples(st.just(name), st.integers(0, 2).flatmap(lambda which: own if which else FILE_DAMAGES))


# --- how they are done ------------------------------------------------------------------------------------------------


def damage(folder: Path, which: Damage, marker: Path) -> None:
    """Do a damage to a file of a folder. `marker`: what code in pickles would make, if it ran."""
    name, (how, *what) = which
    file = folder / name
    done = (
        _damage_file(file, how, what)
        or (file.suffix in (".json", ".jsonl") and _damage_json(file, how, what))
        or (file.suffix == ".safetensors" and _damage_safetensors(file, how, what))
        or (file.suffix in (".bin", ".pt", ".pth") and _damage_pickle(file, how, what, marker))
    )
    assert done, which


def _damage_file(file: Path, how: str, what: list[Any]) -> bool:
    content = file.read_bytes() if file.is_file() else b""
    if how == "cut":
        file.write_bytes(content[: int(what[0] * len(content))])
    elif how == "cut after":
        file.write_bytes(content[: what[0]])
    elif how == "bytes":
        file.write_bytes(what[0])
    elif how == "behind":
        file.write_bytes(content + what[0])
    elif how == "sparse":
        os.truncate(file, what[0])
    elif how in ("remove", "folder", "pipe", "link"):
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)
        elif how == "link":
            _link(file, what[0], content)
    else:
        return False
    return True


def _link(file: Path, target: str, content: bytes) -> None:
    places = {"outside": file.parent.parent / f"outside-{file.name}", "inside": file.parent / f"inside-{file.name}"}
    if target in places:
        places[target].write_bytes(content)
    file.symlink_to({**places, "itself": file.name, "nothing": "nothing"}.get(target, target))


def _damage_json(file: Path, how: str, what: list[Any]) -> bool:
    text = file.read_text(encoding="utf-8")
    if how == "encode":
        file.write_bytes(text.encode(what[0], errors="replace"))
        return True
    if not _is_of_lines(file):
        file.write_text(damaged_json(text, how, what), encoding="utf-8", errors="surrogatepass")
        return True
    lines = text.splitlines()
    if lines:
        place = (what[0] if isinstance(what[0], int) else len(what[0])) % len(lines)
        lines[place] = damaged_json(lines[place], how, what)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return True


def _is_of_lines(file: Path) -> bool:
    return file.suffix == ".jsonl" or file.name == "lines.json"


def damaged_json(text: str, how: str, what: list[Any]) -> str:
    """A JSON text with something in it changed; values are put in as texts, which may be none of JSON."""
    what = [LONG.get(each, each) if isinstance(each, str) else each for each in what]
    if how == "whole":
        return what[0]
    content = json.loads(text)
    places = list(_places(content))
    if how == "add":
        objects = [content, *(holder[key] for holder, key in places if isinstance(holder[key], dict))]
        objects = [each for each in objects if isinstance(each, dict)] or [{}]
        return _with_raw(content, objects[what[0] % len(objects)], what[1], what[2])
    if not places:
        return text
    holder, key = places[what[0] % len(places)]
    if how == "set":
        return _with_raw(content, holder, key, what[1])
    if how == "drop":
        del holder[key]
        return json.dumps(content)
    if how == "twice" and isinstance(holder, dict):
        mark = "@@twice@@"
        holder[mark] = None
        return json.dumps(content).replace(f'"{mark}": null', f"{json.dumps(key)}: {what[1]}")
    return json.dumps([content, content])


def _with_raw(content: Any, holder: Any, key: Any, raw: str) -> str:
    holder[key] = "@@raw@@"
    return json.dumps(content).replace('"@@raw@@"', raw)


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a JSON document, by what holds it and its key, the outer ones first."""
    level = [content]
    while level:
        inner: list[Any] = []
        for each in level:
            keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
            for key in keys:
                yield each, key
                inner.append(each[key])
        level = inner


def _damage_safetensors(file: Path, how: str, what: list[Any]) -> bool:
    if how.startswith("header"):
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        if how == "header size":
            file.write_bytes(struct.pack("<Q", what[0]) + content[8:])
        else:
            header = _damaged_header(content[8 : 8 + size].decode(), *what[0])
            file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
        return True
    save_file(damaged_tensors(load_file(file), how, what), file)
    return True


def _damaged_header(text: str, how: str, *what: Any) -> bytes:
    if how == "encode":
        return text.encode(what[0], errors="replace")
    return damaged_json(text, how, list(what)).encode("utf-8", errors="surrogatepass")


def damaged_tensors(tensors: dict[str, Tensor], how: str, what: list[Any]) -> dict[str, Tensor]:
    """A state dict with something in it changed."""
    names = sorted(tensors)
    if how == "drop all of":
        return {name: tensor for name, tensor in tensors.items() if what[0] not in name}
    if how == "extra":
        return {**tensors, what[0]: torch.ones(what[1])}
    name = names[what[0] % len(names)]
    tensor = tensors.pop(name)
    if how == "rename":
        return {**tensors, what[1]: tensor}
    if how == "drop":
        return tensors
    if how == "shape":
        by_name = {
            "one less": lambda: tensor[..., :-1],
            "one more": lambda: torch.cat([tensor, tensor[:1]]),
            "flat": lambda: tensor.flatten(),
            "turned": lambda: tensor.transpose(0, -1),
            "empty": lambda: tensor[:0],
            "deeper": lambda: tensor[None],
        }
        changed = by_name[what[1]]()
    elif how == "dtype":
        changed = tensor.to(getattr(torch, what[1]))
    else:
        changed = tensor.double() if tensor.is_floating_point() else tensor.clone()
        changed = changed.to(tensor.dtype).clone()
        if changed.is_floating_point():
            changed.view(-1)[-1] = float(what[1])
    return {**tensors, name: changed.contiguous()}


class Code:
    """What makes `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def _damage_pickle(file: Path, how: str, what: list[Any], marker: Path) -> bool:
    state = torch.load(file, map_location="cpu", weights_only=False)
    if how == "code":
        _write_code(file, what[0], state, marker)
    elif how == "content":
        tensor = torch.ones(2, 2)
        contents = {
            "list": [tensor],
            "none": None,
            "numbers": {"a": 1},
            "numbered": {1: tensor},
            "nested": {"a": {"b": tensor}},
            "expanded": {"model.norm.weight": torch.ones(1).expand(1 << 17, 1 << 17)},
            "meta": {"model.norm.weight": torch.empty(1 << 20, 1 << 20, device="meta")},
        }
        torch.save(contents[what[0]], file)
    elif how == "member":
        _damage_member(file, what[0])
    else:
        torch.save(damaged_tensors(state, how, what) if _is_state_dict(state) else {}, file)
    return True


def _is_state_dict(state: Any) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(each, Tensor) for each in state.values())


def _write_code(file: Path, how: str, state: Any, marker: Path) -> None:
    code = Code(marker)
    state = dict(state) if isinstance(state, dict) else {}
    if how == "plain pickle":
        file.write_bytes(pickle.dumps({**state, "x": code}))
    else:
        state |= {"name": {(code,): 1}} if how == "name" else {"x": code}
        torch.save([state, code] if how == "beside" else state, file, _use_new_zipfile_serialization=how != "old form")


def _damage_member(file: Path, how: str) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = list(members)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            if how == "gone" and name == names[-1]:
                continue
            packing = zipfile.ZIP_DEFLATED if how == "deflated" else zipfile.ZIP_STORED
            archive.writestr(name, content, packing)
            if how == "twice" and name == names[0]:
                archive.writestr(name, content)
        if how == "script":
            archive.writestr(f"{names[0].partition('/')[0]}/code/__torch__.py", "import os")
        if how == "outside":
            archive.writestr("../../outside", "x")
