"""What `llava-mixlora inspect` says of an adapter, and of folders that hold none."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llava_mixlora import MixLoraConfig
from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES
from llava_mixlora.adapters.inspect_adapter import read_contents
from llava_mixlora.cli import main

from ...tiny import random_ids


@pytest.fixture
def adapter(llama, tmp_path):
    """Writes an adapter that was trained on `rows` rows."""

    def write(rows=3, **options):
        options = {"r": 2, "num_factors": 6, "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(llama, MixLoraConfig(**options)).train()
        if rows:
            model(input_ids=random_ids(rows, 5))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return write


def printed(capsys, folder):
    assert main(["inspect", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def error_of(capsys, command, *words):
    assert main([command, *map(str, words)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("llava-mixlora: error: ")
    return line


def test_parameters_are_counted_by_kind(adapter):
    folder = adapter(target_modules=["q_proj"], modules_to_save=["lm_head"])
    torch.save({"base_model.model.model.mm_projector.weight": torch.zeros(4, 5)}, folder / NON_LORA_TRAINABLES)
    contents = read_contents(folder)
    assert contents.layers == 2
    assert contents.parameters == {
        "pool A": 2 * 6 * 32,
        "pool B": 2 * 6 * 32,
        "routers": 2 * 2 * 6 * 32,
        "cfs": 2 * 2 * 6 * 32,
        "further modules": 320 * 32,
        "beside the adapter": 20,
    }


def test_configuration_and_statistics_are_printed(adapter, capsys):
    lines = printed(capsys, adapter(rank_pattern={"q_proj": 3}, balance_loss_weight=0.0))
    assert any("routing=ifs_cfs" in line and "num_factors=6" in line for line in lines)
    assert "adapted layers: 14" in lines
    rows = [line.split() for line in lines if line.startswith("model.layers.")]
    assert len(rows) == 14 and all(len(row) == 2 + 6 and row[1] == "3" for row in rows)
    assert all(0 <= float(figure) <= 1 for row in rows for figure in row[2:])
    assert lines[-1].startswith("mean over the layers")


def test_untrained_adapter_has_no_statistics(adapter, capsys):
    assert printed(capsys, adapter(rows=0))[-1].startswith("no statistics")


def test_layers_come_in_the_order_of_the_model(adapter):
    folder = adapter()
    layers = list(read_contents(folder).usage)
    assert len(layers) == 14 and [layer.split(".")[2] for layer in layers] == ["0"] * 7 + ["1"] * 7


@pytest.mark.parametrize("command", ["inspect", "plot"])
def test_folder_that_is_no_adapter_is_named(capsys, command, llama_folder, llama, tmp_path):
    assert f"{tmp_path / 'gone'}: no such folder" in error_of(capsys, command, tmp_path / "gone")
    assert "is no MIXLORA adapter" in error_of(capsys, command, llama_folder)
    get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert "peft_type='LORA'" in error_of(capsys, command, tmp_path)


@pytest.mark.parametrize("command", ["inspect", "plot"])
def test_damaged_files_are_named(capsys, command, adapter):
    folder = adapter()
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config[:50])
    assert "adapter_config.json is damaged" in error_of(capsys, command, folder)
    (folder / "adapter_config.json").write_text(config.replace('"r": 2', '"r": 9'))
    assert "adapter_config.json: r=9: expected 1 to num_factors=6" in error_of(capsys, command, folder)
    (folder / "adapter_config.json").write_text(config)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "adapter_model.safetensors is damaged" in error_of(capsys, command, folder)
    weights.unlink()
    assert "adapter_model.safetensors is missing" in error_of(capsys, command, folder)


@pytest.mark.parametrize("command", ["inspect", "plot"])
def test_newer_adapter_is_named(capsys, command, adapter):
    folder = adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "format_version": 2}))
    assert "newer llava-mixlora" in error_of(capsys, command, folder)


def test_reader_that_has_read_enough_is_no_error(adapter):
    words = [sys.executable, "-m", "llava_mixlora", "inspect", str(adapter())]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE
    assert "BrokenPipeError" not in said
