"""`llava-mixlora merge` and `export-lora`, and what programs without the plugin make of the results."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from llava_mixlora import MixLoraError
from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES, read_non_lora_trainables
from llava_mixlora.adapters.adapter_record import RECORD, AdapterRecord
from llava_mixlora.adapters.model_choices import ModelChoices
from llava_mixlora.cli import main
from llava_mixlora.data.conversations import read_conversations
from llava_mixlora.data.kept_calibration import KEPT, keep_calibration
from llava_mixlora.inference.samples import SampleSource
from llava_mixlora.merging import calibration, merge
from llava_mixlora.merging.fidelity import Fidelity
from llava_mixlora.merging.stand_in import source_of_kept
from llava_mixlora.writing import save_tensors

from ...tiny import plain, write_adapter

PROMPT = [[1, 5, -200, 7, 8, 9]]

WITHOUT_THE_PLUGIN = """
import sys, torch
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "llava_mixlora":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
ids = torch.tensor([[1, 5, -200, 7, 8, 9]])
images = torch.load(sys.argv[1])
"""
GENERATE = """
tokenizer, model, processor, _ = load_pretrained_model(sys.argv[2], None, "llava-merged", device="cpu")
answer = model.generate(ids, images=images.half(), do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
assert answer.shape[1] >= 4 and processor is not None
model = LlavaLlamaForCausalLM.from_pretrained(sys.argv[2])
model.get_vision_tower().load_model()
torch.save(model(input_ids=ids, images=images).logits.detach(), sys.argv[3])
"""
MERGE_LORA_WEIGHTS = """
tokenizer, model, processor, _ = load_pretrained_model(sys.argv[2], sys.argv[4], "llava-exported-lora", device="cpu")
model.save_pretrained(sys.argv[3])
tokenizer.save_pretrained(sys.argv[3])
"""


@pytest.fixture(scope="module")
def base(llava_folder):
    return llava_folder


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Upstream's checkpoint holds the vision tower twice, and transformers reports that at length."""
    caplog.set_level("ERROR", logger="transformers.modeling_utils")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    file = tmp_path_factory.mktemp("images") / "images.pt"
    torch.save(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)), file)
    return file


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("llava-mixlora"))


@pytest.fixture
def untrained(base, tmp_path):
    return write_adapter(base, tmp_path / "llava-untrained-mixlora", trained=False)


def given(data, **options):
    return SampleSource(str(data / "data.json"), **{"image_folder": str(data), "batch_size": 4, **options})


def with_projector(base, adapter):
    model = plain(base)
    beside = torch.load(adapter / NON_LORA_TRAINABLES)
    model.load_state_dict({name.removeprefix("base_model.model."): p for name, p in beside.items()}, strict=False)
    return model


def logits(model, images):
    model.get_model().get_vision_tower().load_model()
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(PROMPT), images=torch.load(images)).logits


def assert_same(found, expected):
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def run(program, *arguments):
    words = [sys.executable, "-c", WITHOUT_THE_PLUGIN + program, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# --- merging


@pytest.mark.slow
def test_merged_checkpoint_serves_where_the_plugin_is_absent(base, adapter, images, tmp_path, capsys):
    words = ["--model-path", str(adapter), "--save-model-path", str(tmp_path / "llava-merged"), "--force"]
    assert main(["merge", *words]) == 0
    printed = capsys.readouterr().out
    assert "mean over the layers" in printed and "LLaVA loads it with no --model-base." in printed
    run(GENERATE, images, tmp_path / "llava-merged", tmp_path / "logits.pt")
    model = PeftModel.from_pretrained(with_projector(base, adapter), adapter)
    dynamic = logits(model, images)
    merged = logits(model.merge_and_unload(), images)
    assert_same(torch.load(tmp_path / "logits.pt"), merged)
    assert (dynamic - merged).abs().max() > 1e-3 * merged.abs().max()


def test_merge_into_a_folder_that_llava_takes_for_something_else_says_what_to_call_it(adapter, tmp_path, capsys):
    assert (
        main(["merge", "--model-path", str(adapter), "--save-model-path", str(tmp_path / "finetuned"), "--force"]) == 0
    )
    told = capsys.readouterr().out.splitlines()[-1]
    assert "'finetuned' has no 'llava'; rename it, such as to 'llava-finetuned'" in told and "--conv-mode" in told


def test_merged_checkpoint_in_shards_is_the_same(base, adapter, images, tmp_path, monkeypatch):
    merge.merge(adapter, None, tmp_path / "llava-whole", force=True)
    monkeypatch.setattr("llava_mixlora.adapters.shards.SHARD_SIZE", 20_000)
    merge.merge(adapter, None, tmp_path / "llava-shards", force=True)
    shards = sorted(file.name for file in (tmp_path / "llava-shards").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert torch.equal(
        logits(plain(tmp_path / "llava-shards"), images), logits(plain(tmp_path / "llava-whole"), images)
    )


def test_merging_keeps_the_dtype_of_the_base_and_drops_quantization(base, adapter, tmp_path):
    half = tmp_path / "half"
    plain(base).half().save_pretrained(half)
    quantized = shutil.copytree(adapter, tmp_path / "llava-4bit-mixlora")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (quantized / "config.json").write_text(json.dumps(config))
    merge.merge(quantized, str(half), tmp_path / "merged", force=True)
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float16}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("method", ["mean", "lstsq", "regression", "distillation"])
def test_one_route_for_all_inputs_merges_exactly_by_every_method(base, data, images, tmp_path, method):
    adapter = write_adapter(base, tmp_path / "llava-one-route-mixlora", one_route=True)
    fidelity = merge.merge(adapter, None, tmp_path / "llava-merged", method, given(data))
    dynamic = logits(PeftModel.from_pretrained(with_projector(base, adapter), adapter), images)
    assert_same(logits(plain(tmp_path / "llava-merged"), images), dynamic)
    assert all(error < 1e-4 for row in fidelity.heldout.values() for error in row.values())
    assert fidelity.agreement[method].kl < 1e-5 and fidelity.agreement[method].same_token == 1


# --- further forms of the method

FORMS = [
    {"pairing": "same", "router_scope": "instruction"},
    {"pairing": "same", "router_input": "words"},
    {"routing": "ifs_cfs", "router_input": "words", "cfs": "table", "cfs_temperature": 0.5},
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_by_its_statistics_as_peft_does(base, images, tmp_path, form):
    adapter = write_adapter(base, tmp_path / "llava-mixlora", **form)
    fidelity = merge.merge(adapter, None, tmp_path / "llava-merged", force=True)
    assert len(fidelity.training) == 14 and all(0 < row["lstsq"] <= row["mean"] for row in fidelity.training.values())
    # Nothing of the method's own, such as the sums of word vectors, is left in the checkpoint.
    assert not [name for name in load_file(tmp_path / "llava-merged" / "model.safetensors") if "mixlora" in name]
    model = PeftModel.from_pretrained(with_projector(base, adapter), adapter)
    assert_same(logits(plain(tmp_path / "llava-merged"), images), logits(model.merge_and_unload(), images))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exported_and_judged_on_held_out_data(base, data, images, tmp_path, form):
    adapter = write_adapter(base, tmp_path / "llava-mixlora", **form)
    exported = tmp_path / "llava-exported-lora"
    fidelity = merge.export_lora(adapter, None, exported, "lstsq", given(data), force=True)
    assert len(fidelity.heldout) == 14 and all(0 <= row["lstsq"] < 2 for row in fidelity.heldout.values())
    assert fidelity.agreement["lstsq"].tokens > 2
    assert {name.rpartition(".lora_")[2] for name in load_file(exported / "adapter_model.safetensors")} == {
        "A.weight",
        "B.weight",
    }
    model = PeftModel.from_pretrained(with_projector(base, adapter), exported)
    assert logits(model, images).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_one_route_of_any_form_merges_exactly(base, images, tmp_path, form):
    adapter = write_adapter(base, tmp_path / "llava-one-route-mixlora", one_route=True, **form)
    fidelity = merge.merge(adapter, None, tmp_path / "llava-merged")
    dynamic = logits(PeftModel.from_pretrained(with_projector(base, adapter), adapter), images)
    assert_same(logits(plain(tmp_path / "llava-merged"), images), dynamic)
    assert all(error < 1e-4 for row in fidelity.training.values() for error in row.values())


# --- exporting


@pytest.mark.slow
def test_exported_lora_passes_through_stock_peft_and_llavas_own_merge(base, adapter, images, tmp_path):
    exported = tmp_path / "llava-exported-lora"
    assert main(["export-lora", "--model-path", str(adapter), "--save-model-path", str(exported), "--force"]) == 0
    model = PeftModel.from_pretrained(with_projector(base, adapter), exported)
    assert type(model.peft_config["default"]) is LoraConfig and model.peft_config["default"].r == 6
    found = logits(model, images)
    expected = logits(PeftModel.from_pretrained(with_projector(base, adapter), adapter).merge_and_unload(), images)
    assert_same(found, expected)
    run(MERGE_LORA_WEIGHTS, images, exported, tmp_path / "llava-merged", base)
    merged = logits(plain(tmp_path / "llava-merged").float(), images)
    assert (merged - expected).abs().max() < 0.01 * expected.abs().max()  # upstream merges in float16


# --- calibration and the report


def test_calibrated_merge_reports_three_methods_each_no_worse_than_the_one_before(untrained, data, tmp_path, capsys):
    words = ["--model-path", untrained, "--save-model-path", tmp_path / "out", "--method", "regression"]
    words += [
        "--calibration",
        data / "data.json",
        "--image-folder",
        data,
        "--version",
        "llava_v1",
        "--batch-size",
        3,
        "--force",
    ]
    assert main(["merge", *map(str, words)]) == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["samples"] == {"calibration": 16, "held out": 4} and report["training"] == {}
    assert len(report["calibration"]) == len(report["heldout"]) == 14
    for row in report["calibration"].values():
        assert 0 <= row["regression"] <= row["lstsq"] + 1e-6 and row["lstsq"] <= row["mean"] + 1e-6
    assert set(report["agreement"]) == {"mean", "lstsq", "regression"}
    assert report["agreement"]["lstsq"]["kl"] > 0 and report["agreement"]["lstsq"]["tokens"] > 2
    assert (tmp_path / "out" / "merge_report.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out tokens" in capsys.readouterr().out


def test_report_lists_layers_in_one_order():
    names = ["layers.10.up", "layers.2.up", "layers.2.down"]
    errors = {name: {"mean": 0.5} for name in names}
    backwards = dict(reversed(errors.items()))
    lines = list(Fidelity("adapter", "base", "mean", training=errors, heldout=backwards).lines())
    listed = [line.split()[0] for line in lines if line.startswith("layers.")]
    assert listed == 2 * ["layers.2.down", "layers.2.up", "layers.10.up"]


@pytest.mark.slow
def test_regression_in_several_passes_is_the_same(untrained, data, tmp_path, monkeypatch):
    results = []
    for room in (calibration.INPUT_SUMS, 8 * 48**2):
        monkeypatch.setattr(calibration, "INPUT_SUMS", room)
        merge.export_lora(untrained, None, tmp_path / str(room), "regression", given(data), force=True)
        results.append(load_file(tmp_path / str(room) / "adapter_model.safetensors"))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-4, rtol=1e-4)


def test_each_task_has_a_static_stand_in_of_its_own(untrained, data, tmp_path):
    for task in ("color", "shape"):
        fidelity = merge.export_lora(untrained, None, tmp_path / task, "lstsq", given(data, task=task), force=True)
        assert fidelity.task == task and fidelity.samples == {"calibration": 8, "held out": 2}
    color, shape = (load_file(tmp_path / task / "adapter_model.safetensors") for task in ("color", "shape"))
    assert any(not torch.equal(color[name], shape[name]) for name in color)


# --- what the run has kept


@pytest.fixture
def kept(adapter, data, tmp_path):
    """An adapter with samples of its run beside it."""
    folder = shutil.copytree(adapter, tmp_path / "llava-kept-mixlora")
    keep_calibration(folder, read_conversations(data / "data.json"), 20, "data.json", str(data), "llava_v1", seed=0)
    return folder


def command(name, folder, output, *words):
    return main([name, "--model-path", str(folder), "--save-model-path", str(output), *map(str, words)])


def refusal(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava-mixlora: error: ")][0]


@pytest.mark.parametrize("name", ["merge", "export-lora"])
def test_what_the_run_has_kept_makes_and_judges_the_merge_without_a_flag(kept, tmp_path, capsys, name):
    assert command(name, kept, tmp_path / "out", "--steps", 2, "--force") == 0
    said = capsys.readouterr().out
    assert "by distillation" in said and "right dynamic" in said and "color" in said and "shape" in said
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["method"] == "distillation" and report["samples"] == {"calibration": 16, "held out": 4}
    assert set(report["agreement"]) == {"mean", "lstsq", "distillation"}
    assert {task: found["samples"] for task, found in report["by_task"]["distillation"].items()} == {
        "color": 2,
        "shape": 2,
    }


def test_distilling_is_nearer_than_the_best_of_each_layer(kept, data, tmp_path):
    fidelity = merge.merge(kept, None, tmp_path / "out", calibration=given(data), steps=30, force=True)
    assert fidelity.agreement["distillation"].kl < 0.7 * fidelity.agreement["lstsq"].kl


def test_a_bad_merge_is_refused_with_its_figures_before_anything_is_written(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "llava_mixlora.merging.fidelity.LARGEST_KL", 1e-4
    )  # what the random weights lose differs between versions
    assert command("merge", kept, tmp_path / "out", "--method", "mean") == 1
    captured = capsys.readouterr()
    assert "right dynamic" in captured.out  # the table by task says where it loses
    (line,) = [line for line in captured.err.splitlines() if line.startswith("llava-mixlora: error: ")]
    for part in (
        "nats (limit 0.0001)",
        "(limit 85%)",
        "--task NAME",
        "keep the adapter dynamic",
        "--force",
    ):
        assert part in line
    assert not (tmp_path / "out").exists()
    assert command("merge", kept, tmp_path / "out", "--method", "mean", "--force") == 0


def test_what_is_no_adapter_is_named_and_nothing_said_of_its_samples(tmp_path, capsys):
    assert command("merge", tmp_path, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out == "" and f"{tmp_path} is no MIXLORA adapter" in captured.err


def test_an_adapter_without_kept_samples_merges_by_its_statistics_and_says_so(base, tmp_path, capsys):
    old = write_adapter(base, tmp_path / "llava-one-route-mixlora", one_route=True)
    assert command("merge", old, tmp_path / "out") == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "statistics of training" in line]
    assert str(old) in line and "--calibration DATA" in line and "calibration.json" in line
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["method"] == "lstsq"


def test_what_is_not_measured_and_far_off_by_the_statistics_is_refused(adapter, tmp_path, capsys):
    assert command("merge", adapter, tmp_path / "out") == 1
    line = refusal(capsys)
    assert "was not measured" in line and "above 65%" in line and "--calibration DATA" in line and "--force" in line
    assert not (tmp_path / "out").exists()


def test_images_that_are_gone_are_told_with_the_flag_that_names_their_new_place(kept, data, tmp_path, capsys):
    content = json.loads((kept / KEPT).read_text())
    (kept / KEPT).write_text(json.dumps({**content, "image_folder": "/absent/images"}))
    assert command("merge", kept, tmp_path / "out", "--force") == 1
    line = refusal(capsys)
    assert "/absent/images" in line and "--image-folder" in line and "--calibration" in line
    assert command("merge", kept, tmp_path / "out", "--force", "--steps", 1, "--image-folder", data) == 0
    capsys.readouterr()
    assert command("merge", kept, tmp_path / "by-statistics", "--force", "--method", "lstsq") == 0
    assert "merging by the statistics of training" in capsys.readouterr().out


def test_a_task_of_the_kept_samples_is_merged_and_judged_by_itself(kept, tmp_path, capsys):
    assert command("merge", kept, tmp_path / "out", "--task", "color", "--steps", 1, "--force") == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["task"] == "color" and report["samples"] == {"calibration": 8, "held out": 2}
    assert set(report["by_task"]["distillation"]) == {"color"}
    capsys.readouterr()
    assert command("merge", kept, tmp_path / "other", "--task", "size") == 1
    assert "its tasks are color, shape" in refusal(capsys)


def test_a_task_without_data_is_refused(adapter, tmp_path, capsys):
    assert command("merge", adapter, tmp_path / "out", "--task", "color") == 1
    line = refusal(capsys)
    assert "--task color" in line and "--calibration DATA" in line and "calibration.json" in line


def test_template_is_that_of_the_run_unless_the_user_says_another(kept):
    assert source_of_kept(kept).version == "llava_v1"
    assert source_of_kept(kept, version="plain").version == "plain"
    AdapterRecord(conversation="llava_v1").save(kept)
    assert source_of_kept(kept).version == "llava_v1"


def test_samples_of_another_template_than_the_adapters_are_refused(kept, tmp_path, capsys):
    AdapterRecord(conversation="mistral_instruct").save(kept)
    assert command("merge", kept, tmp_path / "out") == 1
    line = refusal(capsys)
    assert "llava_v1" in line and "mistral_instruct" in line and "--version" in line


@pytest.mark.parametrize("flag, value", [("--samples", 0), ("--batch-size", 0), ("--steps", -1), ("--method", "best")])
def test_flags_without_sense_are_named(adapter, tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit):
        command("merge", adapter, tmp_path / "out", flag, value)
    assert flag in capsys.readouterr().err


# --- what cannot be merged


def message_of(*arguments, **options):
    with pytest.raises(MixLoraError) as error:
        merge.merge(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_adapter_without_statistics_asks_for_calibration_data(untrained, tmp_path):
    assert "add --calibration DATA" in message_of(untrained, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_regression_asks_for_calibration_data(adapter, tmp_path):
    assert "--method regression needs data" in message_of(adapter, None, tmp_path / "out", "regression")


def test_calibration_data_without_images_are_refused(adapter, data, tmp_path):
    samples = json.loads((data / "data.json").read_text())
    bare = [{**sample, "image": None} for sample in samples]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    found = message_of(adapter, None, tmp_path / "out", calibration=SampleSource(str(tmp_path / "bare.json")))
    assert "none of its samples has an image" in found
    assert "--image-folder" in message_of(adapter, None, tmp_path / "out", calibration=given(data, image_folder=None))
    missing = given(data, image_folder=str(tmp_path))
    assert "no such image" in message_of(adapter, None, tmp_path / "out", calibration=missing)


def test_task_that_the_data_do_not_have_is_named_with_those_they_have(adapter, data, tmp_path):
    found = message_of(adapter, None, tmp_path / "out", calibration=given(data, task="size"))
    assert "--task size" in found and "color, shape" in found


def test_base_that_does_not_match_is_refused(adapter, llama_folder, clip_folder, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 32)
    save_file(tensors, other / "model.safetensors")
    found = message_of(adapter, str(other), tmp_path / "out")
    assert "for another base" in found and "model.layers.0.mlp.up_proj.weight" in found
    assert "absent" in message_of(adapter, str(clip_folder), tmp_path / "out")


def test_quantized_base_is_refused(adapter, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for name in tensors:
        if "q_proj" in name:
            tensors[name] = torch.zeros(512, 1, dtype=torch.uint8)
    save_file(tensors, other / "model.safetensors")
    assert "16-bit base" in message_of(adapter, str(other), tmp_path / "out")


def test_full_disk_is_known_before_anything_is_written(adapter, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    found = message_of(adapter, None, tmp_path / "deep" / "out")
    assert "are needed" in found and not (tmp_path / "deep").exists()


def test_existing_target_is_refused(adapter, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    assert "is not an empty folder" in message_of(adapter, None, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_interrupted_merging_leaves_no_folder(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_mixlora.adapters.shards.SHARD_SIZE", 20_000)
    written = []

    def interrupted(tensors, file):
        written.append(file)
        save_tensors(tensors, file)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("llava_mixlora.adapters.shards.save_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge.merge(adapter, None, tmp_path / "out", force=True)
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_merging_leaves_nothing_that_looks_finished_and_the_next_clears_up(adapter, tmp_path):
    program = """
import os, signal, sys
from llava_mixlora.adapters import shards
from llava_mixlora.merging import merge
shards.SHARD_SIZE, save_tensors = 20_000, shards.save_tensors
def save(tensors, file):
    save_tensors(tensors, file)
    if file.name == "shard-2":
        os.kill(os.getpid(), signal.SIGKILL)
shards.save_tensors = save
merge.merge(sys.argv[1], None, sys.argv[2], force=True)
"""
    output = tmp_path / "llava-merged"
    done = subprocess.run([sys.executable, "-c", program, str(adapter), str(output)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    left = tmp_path / ".llava-merged.unfinished" / "llava-merged"
    assert {file.name for file in left.iterdir()} >= {"shard-1", "shard-2"}
    assert not (left / "model.safetensors").exists() and not list(left.glob("*.index.json"))
    merge.merge(adapter, None, output, force=True)
    assert list(tmp_path.iterdir()) == [output]


def test_broken_adapter_is_not_merged(adapter, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "llava-broken-mixlora")
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.mixlora_B"][0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    assert "up_proj.mixlora_B (1 tensors) are not finite" in message_of(broken, None, tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("make", [merge.merge, merge.export_lora])
def test_file_with_code_is_neither_run_nor_passed_on(adapter, tmp_path, make):
    hostile = shutil.copytree(adapter, tmp_path / "llava-hostile-mixlora")
    torch.save({"model.mm_projector.0.weight": Code(tmp_path / "ran")}, hostile / NON_LORA_TRAINABLES)
    with pytest.raises(MixLoraError, match=r"holds code \('posix.mkdir'\), which was not executed"):
        make(hostile, None, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_exported_lora_holds_what_was_read_in_both_forms(adapter, tmp_path):
    merge.export_lora(adapter, None, tmp_path / "out", force=True)
    both = read_non_lora_trainables(tmp_path / "out"), read_non_lora_trainables(adapter)
    assert both[0].keys() == both[1].keys() and (tmp_path / "out" / "non_lora_trainables.safetensors").is_file()
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {0o644}


@pytest.mark.parametrize("make", [merge.merge, merge.export_lora])
@pytest.mark.parametrize("name", ["config.json", RECORD, "tokenizer.json", NON_LORA_TRAINABLES])
def test_linked_files_are_not_copied(adapter, base, tmp_path, make, name):
    hostile = shutil.copytree(adapter, tmp_path / "llava-hostile-mixlora")
    (tmp_path / "secret").write_text('{"a": "secret"}')
    if name == "tokenizer.json":  # is copied where the vocabulary has grown
        beside = torch.load(hostile / NON_LORA_TRAINABLES)
        beside |= {
            f"base_model.model.{n}": torch.zeros(321, 32) for n in ("model.embed_tokens.weight", "lm_head.weight")
        }
        torch.save(beside, hostile / NON_LORA_TRAINABLES)
    (hostile / name).unlink(missing_ok=True)
    (hostile / name).symlink_to("../secret")
    with pytest.raises(MixLoraError, match=f"{name} is a link to .*secret, outside of its folder"):
        make(hostile, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [merge.merge, merge.export_lora])
def test_incomplete_adapter_is_not_merged(adapter, tmp_path, make):
    broken = shutil.copytree(adapter, tmp_path / "llava-broken-mixlora")
    tensors = load_file(broken / "adapter_model.safetensors")
    kept = {name: each for name, each in tensors.items() if "layers.1." not in name}
    save_file(kept, broken / "adapter_model.safetensors")
    with pytest.raises(MixLoraError, match=r"lacks model.layers.1"):
        make(broken, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


UP = "model.layers.{}.mlp.up_proj.weight"


def test_layers_that_lack_a_pool_are_left_out_where_an_incomplete_adapter_is_merged(adapter, base, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "llava-broken-mixlora")
    tensors = load_file(broken / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.mixlora_B"]
    save_file(tensors, broken / "adapter_model.safetensors")
    merge.merge(broken, None, tmp_path / "out", choices=ModelChoices(allow_incomplete=True), force=True)
    merged, of_base = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    changed = {n for n in (0, 1) if not torch.equal(merged[UP.format(n)], of_base[UP.format(n)])}
    assert changed == {0}
