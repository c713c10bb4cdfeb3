"""`benchmark gpu` at a size that a CPU can do: what is shared, what is counted, and what is reported."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from llava_mixlora import MixLoraError
from playground import measuring
from playground.benchmarks import benchmark, benchmark_gpu
from playground.benchmarks.benchmark_gpu import SIZES, make_llava, resident_bytes, sharing_copy
from playground.benchmarks.gpu_report import goals, markdown, table
from playground.benchmarks.variants import DEFAULT, FROZEN, MATERIALISED, MIXLORA, REFERENCE

CPU = torch.device("cpu")
SETTINGS = Namespace(size="narrow", layers=1, batch_size=2, rounds=1)


@pytest.fixture(scope="module")
def narrow():
    return make_llava(SIZES["narrow"], 1, "bf16", CPU)


def train(llava, E=4, r=2, checkpointing=True):
    return benchmark_gpu._train(llava, E, r, checkpointing, SETTINGS, CPU)


def test_copies_share_the_base_and_not_the_projector(narrow):
    copy = sharing_copy(narrow)
    shared = {parameter.data_ptr() for parameter in narrow.parameters()}
    own = [name for name, parameter in copy.named_parameters() if parameter.data_ptr() not in shared]
    assert own and all("mm_projector" in name for name in own)


def test_training_leaves_the_shared_base_as_it_is(narrow):
    before = {name: parameter.clone() for name, parameter in narrow.named_parameters()}
    rows = train(narrow)
    assert [row["variant"] for row in rows] == [FROZEN, REFERENCE, *MIXLORA, MATERIALISED]
    for name, parameter in narrow.named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad, name
    for row in rows:
        assert row["milliseconds"] > 0 and row["profile"]["operations"] > 100
    assert rows[1]["milliseconds_ratio"] == rows[1]["peak_bytes_ratio"] == 1


def test_variants_need_the_base_and_what_they_train(narrow):
    base = resident_bytes(narrow)
    frozen, lora, default, same, ifs, ifs_cfs, _ = (row["peak_bytes"] for row in train(narrow))
    assert base < frozen < lora < same < ifs < ifs_cfs and lora < default < ifs


def test_quantized_base_is_smaller_and_trains():
    whole, quantized = (make_llava(SIZES["narrow"], 1, weights, CPU) for weights in ("bf16", "nf4"))
    kinds = {name: type(module).__name__ for name, module in quantized.named_modules()}
    assert {kind for name, kind in kinds.items() if name.endswith("_proj") and "tower" not in name} == {"Linear4bit"}
    assert kinds["lm_head"] == "Linear"
    in_layers = sum(p.numel() for p in whole.model.layers.parameters() if p.ndim == 2)
    saved = resident_bytes(whole) - resident_bytes(quantized)
    assert 2 * in_layers * 0.6 < saved < 2 * in_layers * 0.75  # 4 bits of 16, and tables of the size of these layers
    assert all("out_of_memory" not in row for row in train(quantized))


def test_variant_that_does_not_fit_is_reported_and_left_out(narrow, monkeypatch):
    def fail(*_, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(benchmark_gpu, "_materialise", fail)
    rows = train(narrow)
    assert rows[-1] == {"variant": MATERIALISED, "out_of_memory": True}
    assert all("milliseconds" in row for row in rows[:-1])
    assert "out of memory" in table(rows)
    taken = {"bf16 train, checkpointing on, E=4, r=2": {"rows": rows}}
    assert "| does not fit |" in markdown(taken)
    assert not any("with the update built" in line for line in goals({"size": "narrow"}, taken))
    monkeypatch.setattr(benchmark_gpu, "_adapted", fail)
    with pytest.raises(
        MixLoraError, match="a step with 2 instances does not fit into the memory of cpu; lower --batch-size"
    ):
        train(narrow)


def test_peak_is_the_most_that_was_allocated_at_once():
    kept = []

    def step():
        kept[:] = [torch.zeros(1000)]
        torch.zeros(50_000)
        torch.zeros(20_000)

    assert measuring.peak_bytes(step, CPU) == 4 * 51_000


def test_ratios_are_medians_within_a_round():
    slow_spell = iter([1, 1, 1, 1, 5, 9, 1])  # of three rounds to warm up and four that count
    now = {"seconds": 0.0}

    def clock(step):
        if step is first:
            now["seconds"] = next(slow_spell)
        return step() * now["seconds"]

    def first():
        return 2.0

    def second():
        return 1.0

    # The order turns by one in each round, so the second step of every other round comes before the spell changes.
    measured = measuring.take_turns({"a": first, "b": second}, 4, "a", "test", clock)
    assert measured["a"] == {"milliseconds": 6000.0, "milliseconds_ratio": 1.0}
    assert 0 < measured["b"]["milliseconds_ratio"] <= 1


def row(variant, ms, ratio, GiB=1.0):
    return {
        "variant": variant,
        "milliseconds": ms,
        "milliseconds_ratio": ratio,
        "peak_bytes": round(GiB * 2**30),
        "peak_bytes_ratio": GiB,
    }


def test_goals_name_the_worst_case():
    def case(ratio, GiB):
        variants = [row(REFERENCE, 100, 1.0), row(MATERIALISED, 400, 4.0)]
        return {"rows": [*variants, row("MixLoRA ifs", 100, 1.0), row("MixLoRA ifs_cfs", 100 * ratio, ratio, GiB)]}

    taken = {
        "bf16 train, checkpointing on, E=16, r=4": case(1.04, 1.02),
        "nf4 train, checkpointing on, E=16, r=4": case(1.06, 15.0),
        "bf16 decode, batch 1, E=16, r=4": case(1.2, 1.0),
    }
    settings = {"size": "7b", "layers": None, "batch_size": 4}
    time, memory, decoding, gain, qlora = goals(settings, taken)
    assert (
        time.startswith("- MISSED") and "worst: 1.060 (nf4 train, checkpointing on, E=16, r=4, MixLoRA ifs_cfs)" in time
    )
    assert memory.startswith("- MISSED") and "15.000" in memory
    assert decoding.startswith("- MISSED") and "0.833" in decoding
    assert gain.startswith("- met") and "3.774" in gain
    assert qlora.startswith("- met") and "15.000" in qlora
    with_default = {case: {"rows": [*rows["rows"], row(DEFAULT, 90, 0.9, 0.8)]} for case, rows in taken.items()}
    assert all(line.startswith("- met") and line.endswith(", MixLoRA)") for line in goals(settings, with_default))
    assert len(goals({**settings, "batch_size": 8}, taken)) == 4  # the last is about 4 instances
    assert "at size narrow" in goals({**settings, "size": "narrow"}, taken)[0]


def test_every_variant_runs_as_one_layer():
    x = torch.randn(benchmark.INSTANCES, 5, 8)
    variants = benchmark._layer_variants(8, 12, 4, 2)
    assert [*variants] == [FROZEN, "LoRA r", REFERENCE, *(name for name in MIXLORA if name != DEFAULT), MATERIALISED]
    assert {module(x).shape for module in variants.values()} == {(benchmark.INSTANCES, 5, 12)}
    trained = {name: sum(p.numel() for p in each.parameters() if p.requires_grad) for name, each in variants.items()}
    assert trained["MixLoRA ifs"] - trained["MixLoRA same"] == 4 * 8  # one router of E=4


def test_figures_from_before_a_variant_existed_are_shown_without_it():
    older = [REFERENCE, "MixLoRA ifs", "MixLoRA ifs_cfs", MATERIALISED]
    rows = [{"case": "step", **row(name, 100, 1.0), "saved_bytes_ratio": 1.0} for name in older]
    tables = {"step": {"rows": rows}}, {"train": {"results": rows}}
    for shown in (markdown(tables[0]), benchmark.markdown(tables[1])):
        head, rule, line = shown.splitlines()
        assert "MixLoRA ifs_cfs" in head and "MixLoRA same" not in head
        assert head.count("|") == rule.count("|") == line.count("|")
    assert "MixLoRA same" not in "".join(goals({"size": "narrow"}, {"bf16 train, E=4, r=2": {"rows": rows}}))
    newer = [*rows, {"case": "step", **row("MixLoRA same", 90, 0.9)}]
    assert "| MixLoRA same | MixLoRA ifs |" in benchmark.markdown({"train": {"results": newer}})
    assert "| 0.90 | 1.00 |" in markdown({"step": {"rows": newer}})


@pytest.mark.slow
def test_command_goes_on_after_what_is_measured(tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "playground.benchmarks.benchmark", "gpu", "--size", "narrow", "--layers", "1"]
        command += ["--rounds", "1", "--batch-size", "1", "--weights", "bf16", "--output", str(tmp_path / "out.json")]
        return subprocess.run([*command, *flags], capture_output=True, text=True)

    def stored():
        return json.loads((tmp_path / "out.json").read_text())["taken"]

    assert (done := run("--parts", "load")).returncode == 0, done.stderr
    loaded = stored()
    assert set(loaded) == {"bf16 load, E=16, r=4", "bf16 load, E=64, r=8"}
    done = run("--parts", "load", "decode")
    assert done.returncode == 0 and "decoding is at least 0.95" in done.stdout, done.stderr
    assert len(stored()) == 6 and loaded.items() <= stored().items()  # those of before were not measured again
    for case, measured in stored().items():
        assert {row["variant"] for row in measured["rows"]} >= {REFERENCE, *MIXLORA}, case
        assert all(row["tokens_per_second"] > 0 for row in measured["rows"] if "decode" in case)
    assert run("--parts", "load", "--batch-size", "2").returncode == 0
    assert len(stored()) == 2  # other settings, another measurement


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "narrow", "--rounds", "0"], "error: --rounds 0: expected a whole number of at least 1\n"),
        (["--size", "narrow", "--device", "gpu"], "error: --device gpu: expected cuda, cuda:N or cpu\n"),
        (["--size", "narrow", "--device", "cuda:99"], "error: --device cuda:99: PyTorch sees"),
        ([], "error: --size 7b needs a CUDA GPU"),
    ],
)
def test_bad_input_is_one_line(flags, message, monkeypatch, capsys):
    if not flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["benchmark", "gpu", *flags])
    assert benchmark.main() == 1
    errors = capsys.readouterr().err
    assert errors.startswith(message) and errors.count("\n") == 1
