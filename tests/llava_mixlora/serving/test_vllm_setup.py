"""What vLLM is told, and what is refused before anything is loaded into it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="httpx is not installed")

from llava_mixlora.adapters.model_choices import AS_NAMED
from llava_mixlora.cli import main
from llava_mixlora.serving.served_models import NamedModel, load_served
from llava_mixlora.serving.vllm_setup import (
    EngineOptions,
    _check_has_loras,
    _check_one_base,
    _flags,
    check_flags,
)

from ...tiny import message_of, write_adapter


@pytest.mark.parametrize(
    "flags",
    ["--api-server-count 2", "--api_server_count=4", "-asc 2", "--headless", "--data-parallel-rank 0"],
)
def test_several_api_servers_would_not_know_each_others_loras(flags):
    assert "others would not know it; leave it out" in message_of(check_flags, flags.split(), None)


@pytest.mark.parametrize("flags", ["--port 1", "--host=::", "--api-key k", "--model x"])
def test_what_this_server_says_to_vllm_is_not_said_twice(flags):
    assert f"{flags.split('=')[0].split()[0]}: it is this server's to say" in message_of(
        check_flags, flags.split(), None
    )


def test_flags_of_several_engines_are_passed_on():
    for flags in ("--tensor-parallel-size 2", "--data-parallel-size 2 --api-server-count 1", "--api-server-count=1"):
        check_flags(flags.split(), None)
        options = EngineOptions(None, "python", None, None, flags.split(), at_a_time=8, longest=9, images=4)
        assert _flags(Path("hf"), [4], options)[-len(flags.split()) :] == flags.split()


def test_flags_of_a_vllm_that_runs_are_its_own():
    assert "http://there runs already" in message_of(check_flags, ["--max-loras", "2"], "http://there")


def test_vllm_has_a_lora_for_each_place_and_bounds_whole_models_answers():
    options = EngineOptions(None, "python", None, None, [], at_a_time=5, longest=9, images=4)
    flags = _flags(Path("hf"), [4, 9], options)
    assert [flags[flags.index(name) + 1] for name in ("--max-lora-rank", "--max-loras")] == ["16", "5"]
    flags = _flags(Path("hf"), [], options)
    assert json.loads(flags[flags.index("--override-generation-config") + 1]) == {"max_new_tokens": 9}
    assert "vLLM takes LoRAs of rank 512 at most" in message_of(_flags, Path("hf"), [513], options)


def test_words_that_are_none_are_one_line(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "--port", "0", "--engine", "vllm", "--engine-flags", "--a 'b"]) == 1
    assert "--engine-flags --a 'b: not the words of a command line" in capsys.readouterr().err


def test_adapters_of_two_templates_are_refused(llava_folder, tmp_path):
    """vLLM renders all conversations by one."""
    write_adapter(llava_folder, tmp_path / "one")
    models = [NamedModel("one", str(tmp_path / "one")), NamedModel("other", str(tmp_path / "one"))]
    served = {}
    for model, version in zip(models, ("v1", "llava_llama_2")):
        served |= dict(load_served([model], None, 16, version, AS_NAMED))
    assert "v1 and" in message_of(_check_one_base, models, served)


def test_adapter_that_is_no_lora_for_a_prompt_is_refused(llava_folder, tmp_path):
    write_adapter(llava_folder, tmp_path / "step", decode_routing="step")
    model = NamedModel("step", str(tmp_path / "step"))
    served = dict(load_served([model], None, 16, "v1", AS_NAMED))["step"]
    assert "decode_routing='step'" in message_of(_check_has_loras, model, served)
