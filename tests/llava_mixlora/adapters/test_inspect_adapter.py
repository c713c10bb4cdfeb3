"""What `llava-mixlora inspect` says of an adapter, and of folders that hold none."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES
from llava_mixlora.adapters.adapter_record import AdapterRecord
from llava_mixlora.adapters.inspect_adapter import read_contents
from llava_mixlora.adapters.score_spread import INPUTS, SEED, score_spread
from llava_mixlora.cli import main
from llava_mixlora.method.mixture import conditional_scores, conditional_table

from ...tiny import paper_form, random_ids


@pytest.fixture
def adapter(llama, tmp_path):
    """Writes an adapter that was trained on `rows` rows."""

    def write(rows=3, **options):
        options = {"r": 2, "num_factors": 6, "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(llama, paper_form(**options)).train()
        if rows:
            model(input_ids=random_ids(rows, 5))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return write


def printed(capsys, folder):
    assert main(["inspect", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def rows_below(lines, title):
    """The rows of a table, split, whose head begins with `title`; one for each layer."""
    (head,) = [number for number, line in enumerate(lines) if line.startswith(title)]
    end = next(number for number in range(head, len(lines)) if lines[number].startswith("mean over the layers"))
    return [line.split() for line in lines[head + 1 : end]]


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
    rows = rows_below(lines, "routing in training")
    assert len(rows) == 14 and all(len(row) == 2 + 6 and row[1] == "3" for row in rows)
    assert all(0 <= float(figure) <= 1 for row in rows for figure in row[2:])
    assert lines[-1].startswith("mean over the layers")


def test_what_it_was_trained_with_is_printed(adapter, capsys):
    folder = adapter()
    AdapterRecord(conversation="v1", data={"name": "mix.json", "samples": 3}).save(folder)
    lines = printed(capsys, folder)
    assert "conversation template: v1" in lines and "data: mix.json, 3 samples" in lines


def test_options_and_tasks_of_the_method_are_printed(adapter, capsys):
    options = {"task_loss_weight": 0.1, "tasks": ["color", "shape"], "router_scope": "instruction"}
    lines = printed(capsys, adapter(rows=0, pairing="same", router_input="words", **options))
    settings = "  ".join(lines).split("  ")
    for shown in ("pairing=same", "routing=ifs", "router_input=words", "task_loss_weight=0.1", "format_version=2"):
        assert shown in settings
    assert "tasks (2): color, shape" in lines
    assert not any(setting.startswith("cfs_") for setting in settings)  # which such an adapter has not


def test_how_cfs_scores_is_printed_where_there_is_cfs(adapter, capsys):
    lines = printed(capsys, adapter(rows=0, cfs="table", cfs_temperature=0.5))
    assert {"cfs=table", "cfs_temperature=0.5", "cfs_product=inner"} <= set("  ".join(lines).split("  "))
    assert not any(line.startswith("tasks") for line in lines)


def test_of_many_tasks_some_are_named(adapter, capsys):
    names = [f"task{number}" for number in range(15)]
    (line,) = [line for line in printed(capsys, adapter(rows=0, tasks=names)) if line.startswith("tasks")]
    assert line.startswith("tasks (15): task0, ") and line.endswith("task11, ...")


def test_one_choice_for_both_pools_is_shown_once(adapter, capsys):
    folder = adapter(pairing="same")
    rows = rows_below(printed(capsys, folder), "routing in training (one choice for both pools)")
    assert len(rows) == 14 and all(len(row) == 2 + 3 and row[1] == "3" for row in rows)
    contents = read_contents(folder)
    assert contents.parameters["routers"] == contents.parameters["pool A"] and contents.parameters["cfs"] == 0


@pytest.mark.parametrize(("rows", "said"), [(3, "settles at 512"), (600, "(settled)")])
def test_words_adapter_tells_how_many_instances_made_its_centre(adapter, capsys, rows, said):
    folder = adapter(rows, router_input="words", routing="ifs")
    contents = read_contents(folder)
    assert contents.word_instances == rows
    (line,) = [line for line in printed(capsys, folder) if line.startswith("centre of the word vectors")]
    assert f"mean over {rows} instances" in line and said in line
    assert contents.parameters["routers"] == 14 * 2 * 6 * 32  # the sums of words are no parameters


def test_spread_of_cfs_is_printed_beside_that_of_ifs(adapter, capsys):
    lines = printed(capsys, adapter(rows=0))
    assert any("256 random inputs of unit rms" in line for line in lines)
    rows = [list(map(float, row[1:])) for row in rows_below(lines, "CFS beside IFS")]
    assert len(rows) == 14 and all(len(row) == 4 for row in rows)
    for ifs_factors, ifs_inputs, cfs_factors, cfs_choices in rows:  # at initial scale p_AB decides next to nothing
        assert cfs_choices > 0 and 0 < cfs_factors < ifs_factors / 10 and ifs_inputs > 0


def test_adapter_without_cfs_has_no_spread_to_print(adapter, capsys):
    assert not any("CFS" in line or "centre" in line for line in printed(capsys, adapter(rows=0, routing="ifs")))


def test_spread_is_the_same_at_every_call(adapter):
    folder = adapter(rows=0)
    first = read_contents(folder).spread
    torch.manual_seed(1)
    assert read_contents(folder).spread == first and len(first) == 14


@pytest.mark.parametrize("product", ["inner", "sums"])
def test_spread_is_that_of_the_scores_by_their_definition(product):
    E, r, d = 6, 2, 8
    factors_A, router_B, cfs = torch.randn(E, d), torch.randn(E, d), torch.randn(r, E, d)
    config = paper_form(r=r, num_factors=E, cfs_product=product, cfs_temperature=0.5)
    found = score_spread(config, factors_A, router_B, cfs)
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(INPUTS, d, generator=generator)
    p_B = (inputs / inputs.square().mean(dim=1, keepdim=True).sqrt() @ router_B.t()).softmax(dim=-1)
    chosen = torch.rand(2, INPUTS, E, generator=generator).topk(r).indices[0]
    p_AB = conditional_scores(factors_A, cfs, chosen, product, 0.5)
    expected = [scores.var(dim=dim, correction=0).mean().sqrt().item() for scores in (p_B, p_AB) for dim in (1, 0)]
    assert list(found) == pytest.approx(expected, rel=1e-4)


def test_table_of_cfs_has_the_spread_of_the_weights_that_it_comes_from():
    E, r, d = 6, 2, 8
    factors_A, router_B, cfs = torch.randn(E, d), torch.randn(E, d), torch.randn(r, E, d)
    of_weights = score_spread(paper_form(r=r, num_factors=E), factors_A, router_B, cfs)
    table = conditional_table(factors_A, cfs)
    assert score_spread(paper_form(r=r, num_factors=E, cfs="table"), factors_A, router_B, table) == of_weights


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
    (folder / "adapter_config.json").write_text(json.dumps({**config, "format_version": 3}))
    assert "newer llava-mixlora" in error_of(capsys, command, folder)


def test_reader_that_has_read_enough_is_no_error(adapter):
    words = [sys.executable, "-m", "llava_mixlora", "inspect", str(adapter())]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE
    assert "BrokenPipeError" not in said
