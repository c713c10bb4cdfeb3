"""Task interference of adapters: the gradient form against steps that are really made, and the command."""

import json
import math
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from llava_mixlora import MixLoraError
from llava_mixlora.analysis import interference
from llava_mixlora.analysis.interference import factor_parameters, fix_routes, gram_matrices
from llava_mixlora.analysis.interference_estimate import MEAN_OF_RATIOS, RATIO_OF_MEANS, batch_gains, estimate
from llava_mixlora.analysis.interference_report import Interference
from llava_mixlora.cli import main
from llava_mixlora.inference.loading import load_for_inference
from llava_mixlora.inference.samples import SampleSource, batches, samples_by_task
from llava_mixlora.method.forward_passes import generation

from ...tiny import LINEAR_LAYERS, paper_form, plain, random_ids, randomise, write_adapter

STEP = 2e-4  # small for the curvature, large for the float32 in which Llama normalises
TASKS, BATCHES = 2, 3
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


@pytest.fixture(scope="module")
def adapters(patched, llava_folder, tmp_path_factory):
    """What upstream's train() writes after runs of both kinds; a plain LoRA names no tower to exclude."""
    torch.manual_seed(0)  # or what the losses' curvature adds to a step would depend on the tests before
    folder = tmp_path_factory.mktemp("llava-lora")
    config = LoraConfig(r=2, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(plain(llava_folder), config)  # its tower is not loaded yet
    model.config.save_pretrained(folder)
    model.save_pretrained(folder)
    return {"MixLoRA": write_adapter(llava_folder, tmp_path_factory.mktemp("llava-mixlora")), "LoRA": folder}


@pytest.fixture
def given(data):
    return SampleSource(str(data / "data.json"), str(data), samples=6, version="llava_v1", batch_size=2)


def loss_of(model, batch):
    """In float64; the model's own loss is rounded to float32, too coarse for so small a step."""
    logits, labels = model(**batch, use_cache=False).logits, batch["labels"]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def falls_by_steps(losses, parameters):
    """How far each batch's loss falls, in units of the step, by a real normalised step on each, [T, K, T, K]."""
    kept, stepped = [parameter.data for parameter in parameters], []
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        stepped.append([data - STEP * gradient / norm for data, gradient in zip(kept, gradients)])
    falls = []
    for loss in losses:
        with torch.no_grad(), generation():  # keeps the routes of its first forward pass for all others
            before = loss().item()
            for values in stepped:
                put(parameters, values)
                falls.append((before - loss().item()) / STEP)
            put(parameters, kept)
    return torch.tensor(falls, dtype=torch.float64).view(TASKS, BATCHES, TASKS, BATCHES)


def put(parameters, values):
    for parameter, value in zip(parameters, values):
        parameter.data = value


def interference_by_steps(falls, estimator):
    """The definition with its expectations written out, over x_i and x_j that are not the same."""

    def change(i, b, j):
        return [falls[i, b, j, c].item() for c in range(BATCHES) if (i, b) != (j, c)]

    def mean(numbers):
        return sum(numbers) / len(numbers)

    def entry(i, j):
        theirs, own = ([mean(change(i, b, task)) for b in range(BATCHES)] for task in (j, i))
        if estimator == MEAN_OF_RATIOS:
            return mean([t / o for t, o in zip(theirs, own)])
        return mean(theirs) / mean(own)

    return torch.tensor([[entry(i, j) for j in range(TASKS)] for i in range(TASKS)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MixLoRA", "LoRA"])
def test_gradient_form_agrees_with_steps_that_are_made(adapters, llava_folder, given, kind):
    loaded = load_for_inference(adapters[kind], llava_folder, keep_adapter=True)
    model = loaded[1].double()
    parameters = factor_parameters(model, LAYERS)
    fix_routes(model)
    samples = [sample for of_task in samples_by_task(given).values() for sample in of_task]
    read = list(batches(samples, loaded, given, "Reading"))
    losses = [lambda batch=batch: loss_of(model, batch) for batch in read]
    if losses[0]().dtype != torch.float64:
        pytest.skip("transformers before 5 computes losses in float32, too coarse for small steps")
    found = gram_matrices(lambda title: (loss() for loss in losses), len(losses), parameters)
    assert set(found) == set(product("AB", LAYERS))
    compared = 0
    for pool in "AB":
        grams = [found[pool, layer] for layer in LAYERS]
        steps = [[parameters[pool, layer]] for layer in LAYERS]
        grams.append(sum(grams))  # a step on both layers at once
        steps.append([parameters[pool, layer] for layer in LAYERS])
        for gram, stepped in zip(grams, steps):
            gram = gram.view(TASKS, BATCHES, TASKS, BATCHES)
            falls = falls_by_steps(losses, stepped)
            gains = batch_gains(gram)
            between = gains != 0
            assert torch.allclose(gains[between], falls[between], atol=0.01 * falls.abs().max().item())
            for estimator in (RATIO_OF_MEANS, MEAN_OF_RATIOS):
                difference = estimate(gram, estimator).interference - interference_by_steps(falls, estimator)
                compared += int((~difference.isnan()).sum())
                assert difference.nan_to_num().abs().max() < 0.02
    assert compared >= 2 * 3 * 2 * 2  # half of them, at least


def test_no_gradient_of_the_routers_flows_into_the_factors(llama):
    model = randomise(get_peft_model(llama, paper_form(r=2, num_factors=4, target_modules=["q_proj", "up_proj"])))
    model.eval()
    parameters, ids = list(factor_parameters(model).values()), random_ids(2, 6)

    def gradients():
        return torch.autograd.grad(model(input_ids=ids, labels=ids, use_cache=False).loss, parameters)

    straight_through = gradients()
    with generation():
        model(input_ids=ids, labels=ids, use_cache=False)
        expected = gradients()  # with the cores of the first forward pass as constants
    fix_routes(model)
    assert all(torch.allclose(found, wanted) for found, wanted in zip(gradients(), expected))
    assert not all(torch.allclose(found, wanted) for found, wanted in zip(straight_through, expected))


def test_plain_lora_is_measured_in_the_language_model_alone(adapters, llava_folder):
    model = load_for_inference(adapters["LoRA"], llava_folder, keep_adapter=True)[1]
    assert len(factor_parameters(model)) == 2 * 14
    assert not any("vision_tower" in name and "lora" in name for name, _ in model.named_parameters())


def test_layers_are_chosen_by_whole_parts_of_their_names(llama):
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))

    def chosen(*layers):
        return {layer for _, layer in factor_parameters(model, layers)}

    assert chosen("layers.0.mlp") == {"model.layers.0.mlp.up_proj"}
    assert chosen("layers.1", "q_proj") == {*(f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)), LAYERS[1]}
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 3
    with pytest.raises(MixLoraError, match="--layers layers.9 q: .*such as model.layers.0.self_attn.q_proj to"):
        chosen("layers.9", "q")


def test_gradients_that_do_not_fit_at_once_are_taken_in_passes(llama, monkeypatch):
    model = randomise(get_peft_model(llama, paper_form(r=2, num_factors=4, target_modules=["q_proj"]))).eval()
    parameters = factor_parameters(model)
    titles = []

    def losses(title):
        titles.append(title)
        return (model(input_ids=ids, labels=ids).loss for ids in (random_ids(1, 6, seed=n) for n in range(3)))

    at_once = gram_matrices(losses, 3, parameters)
    monkeypatch.setattr(interference, "GRADIENTS", 2 * 4 * 3 * 4 * 32)
    in_passes = gram_matrices(losses, 3, parameters)
    assert titles == ["Gradients", "Gradients, pass 1 of 2", "Gradients, pass 2 of 2"]
    assert list(in_passes) == list(at_once) and all(torch.equal(in_passes[key], at_once[key]) for key in at_once)


def test_recommendation_looks_at_each_picture_once_in_however_many_passes(adapters, given, monkeypatch):
    found, seen = [], []
    find = interference.separability

    def noted(samples, tokenizer, embeddings, pictures):
        seen.append(pictures)
        return find(samples, tokenizer, embeddings, pictures)

    monkeypatch.setattr(interference, "separability", noted)
    for gradients in (interference.GRADIENTS, 2 * 4 * 6 * 4 * 32):
        monkeypatch.setattr(interference, "GRADIENTS", gradients)
        found.append(interference.interference(adapters["LoRA"], None, given).recommendation)
    assert len(seen[0]) == 12 and torch.equal(*seen) and len(seen[0].unique(dim=0)) == 12
    assert found[0].figures["words"] == found[1].figures["words"] is not None


def test_every_batch_is_of_one_task_and_shares_no_sample(adapters, given, monkeypatch):
    seen = []

    def noted(samples, *rest):
        seen.extend(samples)
        return batches(samples, *rest)

    monkeypatch.setattr(interference, "batches", noted)
    found = interference.interference(adapters["MixLoRA"], None, SampleSource(**{**vars(given), "samples": 7}))
    assert found.batches == 3 and len(seen) == 12  # what does not fill a batch is left out
    assert len({sample["id"] for sample in seen}) == 12
    assert [sample["task"] for sample in seen] == ["color"] * 6 + ["shape"] * 6


def words(adapter, data, *more):
    asked = [adapter, "--data", data / "data.json", "--image-folder", data, "--version", "llava_v1", *more]
    return ["interference", *map(str, asked)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MixLoRA", "LoRA"])
def test_command_measures_adapters_of_both_kinds(adapters, llava_folder, data, tmp_path, kind):
    more = ["--samples", 9, "--batch-size", 3, "--model-base", llava_folder, "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "llava_mixlora", *words(adapters[kind], data, *more)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "A of all layers" in done.stdout and "B of all layers" in done.stdout
    assert "Gradients: 100%" in done.stderr and "6/6" in done.stderr
    found = json.loads((tmp_path / "out" / "interference.json").read_text())
    assert found["recommendation"]["text"] in " ".join(done.stdout.split())
    assert ("own routes" in found["recommendation"]["text"]) == (kind == "MixLoRA")
    assert found["tasks"] == ["color", "shape"] and found["batches"] == found["batch_size"] == 3
    assert len(found["by_layer"]["A"]) == len(found["by_layer"]["B"]) == 14
    for pool in "AB":
        for one in (found["all_layers"][pool], *found["by_layer"][pool].values()):
            for row, measurable in enumerate(one["measurable"]):
                assert one["interference"][row][row] == (1 if measurable else None)
                assert one["gains"][row][row] is not None
    assert (tmp_path / "out" / "interference.png").read_bytes().startswith(b"\x89PNG")


def report_of(gradients, tasks):
    gram = torch.einsum("ibd,jcd->ibjc", gradients, gradients)
    found = estimate(gram)
    both = {"A": found, "B": found}
    by_layer = {pool: {"layer": found} for pool in both}
    return Interference("adapter", tasks, gradients.shape[1], 1, 0, RATIO_OF_MEANS, both, by_layer)


def test_what_is_not_measurable_is_shown_as_such(tmp_path):
    gradients = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)) * 0.1
    gradients[0, :, 0] += 1
    gradients[1, :, 0] -= 1
    report = report_of(gradients, ["one", "opposed", "noise"])
    lines = list(report.lines())
    table = {line.split()[1]: line.split()[2:] for line in lines[2:5]}
    assert table["noise"] == ["-", "-", "-"]
    assert table["one"][0] == "1.00" and float(table["one"][1]) == pytest.approx(-1, abs=0.1)
    assert any(line.startswith("2 of 3 tasks measurable") for line in lines)
    assert "middle of training" in [line for line in lines if line][-1]
    report.save(tmp_path)
    found = json.loads((tmp_path / "interference.json").read_text())["all_layers"]["A"]
    assert found["interference"][2] == [None] * 3 and found["measurable"] == [True, True, False]
    assert all(math.isfinite(gain) for row in found["gains"] for gain in row)


def test_fresh_adapter_has_nothing_to_measure_in_A(llava_folder, data, tmp_path, patched, capsys):
    adapter = tmp_path / "llava-mixlora"
    model = get_peft_model(plain(llava_folder), paper_form(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.config.save_pretrained(adapter)
    model.save_pretrained(adapter)
    assert main(words(adapter, data, "--samples", 3, "--batch-size", 1)) == 0
    printed = capsys.readouterr().out
    assert "0 of 2 tasks measurable" in printed and "Whether these tasks interfere cannot be told" in printed
    found = json.loads((adapter / "interference" / "interference.json").read_text())["all_layers"]
    assert found["A"]["interference"] == [[None, None]] * 2 and found["B"]["gains"][0][0] is not None


def test_bad_input_is_one_line(adapters, llava_folder, data, tmp_path, capsys):
    def error_of(*more, adapter=adapters["MixLoRA"]):
        assert main(words(adapter, data, "--output", tmp_path / "out", *more)) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("llava-mixlora: error: ")
        return line

    def written(samples):
        (tmp_path / "other.json").write_text(json.dumps(samples))
        return "--data", tmp_path / "other.json"

    few = ("--samples", 6, "--batch-size", 2)
    samples = json.loads((data / "data.json").read_text())
    assert "--tasks size: " in error_of(*few, "--tasks", "color", "size") and "color, shape" in error_of("--tasks", "x")
    assert "two tasks at least" in error_of(*few, "--tasks", "color")
    assert "two tasks at least" in error_of(*few, *written(samples[::2]))
    without_tasks = [{**sample, "task": None} for sample in samples]
    for sample in without_tasks:
        del sample["task"]
    assert "found none" in error_of(*few, *written(without_tasks))
    assert "has 10 of task 'color'; ask for fewer" in error_of("--samples", 12, "--batch-size", 2)
    assert "expected 3 batches of each task at least, got 2" in error_of("--samples", 5, "--batch-size", 2)
    text_only = [{**sample, "image": None} for sample in samples]
    assert "none of its samples has an image" in error_of(*few, *written(text_only))
    (tmp_path / "empty").mkdir()
    assert "no such image" in error_of(*few, "--image-folder", tmp_path / "empty")
    assert "has no adapter_config.json" in error_of(*few, adapter=llava_folder)
    assert "no such folder" in error_of(*few, adapter=tmp_path / "gone")
    assert "--layers q: no adapted layer" in error_of(*few, "--layers", "q")
    # LLaVA masks a conversation with the template's separator in an answer.
    mute = [
        {"from": "human", "value": "<image>\nwhat color?"},
        {"from": "gpt", "value": "red</s>blue"},
    ]
    assert "the loss of a batch of task 'color' is nan" in error_of(
        *few, *written([{**sample, "conversations": mute} for sample in samples])
    )
