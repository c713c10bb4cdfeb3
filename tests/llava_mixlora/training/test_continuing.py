"""Going on from an adapter: what a run takes from it, and what it cannot be told; trained in tests/end_to_end."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES, read_config, read_non_lora_trainables
from llava_mixlora.training.continuing import (
    check_is_no_adapter,
    continued_config,
    continued_tasks,
    description_of,
    take_over,
    words_of_adapter,
)
from llava_mixlora.training.given_flags import given_flags

from ...tiny import LINEAR_LAYERS, message_of, plain, write_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def _adapters(llava_folder, tmp_path_factory):
    torch.manual_seed(5)
    place = tmp_path_factory.mktemp("adapters")
    write_adapter(llava_folder, place / "mixlora")
    write_adapter(
        llava_folder, place / "tasks", pairing="same", task_loss_weight=0.1, tasks=["ocr", "vqa"], trained=False
    )
    lora = get_peft_model(plain(llava_folder), LoraConfig(r=2, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM"))
    lora.config.save_pretrained(place / "lora")
    lora.save_pretrained(place / "lora")
    shutil.copy(place / "mixlora" / NON_LORA_TRAINABLES, place / "lora")
    return place


@pytest.fixture
def adapter(_adapters, tmp_path):
    """A copy of a trained adapter, MixLoRA unless another is asked for, which a test may damage."""

    def adapter(kind="mixlora"):
        return shutil.copytree(_adapters / kind, tmp_path / kind)

    return adapter


def words(folder, *flags, enabled="--mixlora_enable=True"):
    return words_of_adapter([enabled, f"--mixlora_init_from={folder}", "--output_dir=elsewhere", *flags])


def test_what_is_not_told_is_taken_from_the_adapter(adapter, llava_folder, clip_folder):
    taken = given_flags(words(adapter()))
    assert taken == {
        "model_name_or_path": str(llava_folder),
        "vision_tower": str(clip_folder),
        "mm_vision_select_layer": "-2",
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": "False",
        "mm_use_im_patch_token": "False",
        "lora_r": "2",
        "lora_alpha": "8",
        "lora_dropout": "0.0",
        "lora_bias": "none",
    }


def test_what_is_told_is_not_taken(adapter):
    taken = given_flags(words(adapter(), "--lora_dropout=0.3", "--mm_vision_select_layer", "-2"))
    assert "lora_dropout" not in taken and "mm_vision_select_layer" not in taken and taken["lora_r"] == "2"


def test_runs_that_continue_nothing_take_nothing():
    assert words_of_adapter(["--mixlora_enable=True", "--output_dir=out"]) == []


def test_of_a_plain_lora_its_projector_and_base_are_taken(adapter, llava_folder):
    folder = adapter("lora")
    taken = given_flags(words(folder))
    assert taken["model_name_or_path"] == str(llava_folder) and taken["mm_projector_type"] == "mlp2x_gelu"
    assert not any(flag.startswith("lora_") for flag in taken)
    assert continued_config(folder, {}) is None


def test_flags_that_contradict_the_adapter_are_named(adapter):
    folder = adapter()
    for flag, value in {
        "mm_projector_type": "linear",
        "mm_vision_select_layer": "-1",
        "vision_tower": "openai/clip-vit-large-patch14",
        "mm_use_im_start_end": "True",
        "pretrain_mm_mlp_adapter": "projector.bin",
        "freeze_mm_mlp_adapter": "True",
        "mixlora_preset": "paper",
        "mixlora_router_init": "zero",
    }.items():
        said = message_of(words, folder, f"--{flag}={value}")
        assert f"--{flag} {value}" in said and str(folder) in said and "leave" in said


def test_run_without_mixlora_cannot_continue(adapter):
    assert "--mixlora_enable True" in message_of(words, adapter(), enabled="--lora_enable=True")


@pytest.mark.parametrize(("name", "output"), [("mixlora", "mixlora"), ("run/checkpoint-3", "run")])
def test_adapter_is_not_written_over(adapter, tmp_path, name, output):
    folder = adapter()
    if name != "mixlora":
        (tmp_path / "run").mkdir()
        folder = folder.rename(tmp_path / name)
    said = message_of(
        words_of_adapter, ["--mixlora_enable", f"--mixlora_init_from={folder}", f"--output_dir={tmp_path / output}"]
    )
    assert "--output_dir" in said and str(folder) in said


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "is no adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "type 'IA3'"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\0" * 99), "is damaged"),
        (lambda folder: (folder / NON_LORA_TRAINABLES).write_bytes(b"\0" * 99), "is damaged"),
        (lambda folder: (folder / "checksums.sha256").write_text(f"{'0' * 64}  {WEIGHTS}\n"), "is damaged"),
    ],
)
def test_adapter_that_is_not_whole_is_named(adapter, harm, named):
    folder = adapter()
    harm(folder)
    said = message_of(words, folder)
    assert named in said and str(folder) in said


def test_plain_lora_without_a_projector_has_nothing_to_go_on_with(adapter):
    folder = adapter("lora")
    (folder / NON_LORA_TRAINABLES).unlink()
    assert "only the projector goes on" in message_of(words, folder)


def test_projector_that_would_be_random_is_named(adapter, llama_folder):
    folder = adapter()
    (folder / NON_LORA_TRAINABLES).unlink()
    rewrite(folder / "config.json", freeze_mm_mlp_adapter=True)
    assert "--pretrain_mm_mlp_adapter" not in str(words(folder))  # the base has one
    rewrite(folder / "adapter_config.json", base_model_name_or_path=str(llama_folder))
    assert "--pretrain_mm_mlp_adapter" in message_of(words, folder)


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_copy_of_the_base_is_the_base_and_another_model_is_not(adapter, llava_folder, tmp_path):
    folder = adapter()
    copy = shutil.copytree(llava_folder, tmp_path / "copy-of-the-base")
    words(folder, f"--model_name_or_path={copy}")
    weights = load_file(copy / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    said = message_of(words, folder, f"--model_name_or_path={copy}")
    assert str(copy) in said and str(llava_folder) in said and "their weights differ" in said


def test_base_on_record_that_cannot_be_compared_is_told_by_name_and_shapes(adapter, llava_folder, tmp_path):
    folder = adapter()
    rewrite(folder / "adapter_config.json", base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    here = shutil.copytree(llava_folder, tmp_path / "vicuna-7b-v1.5")
    words(folder, f"--model_name_or_path={here}")
    assert "another name" in message_of(words, folder, f"--model_name_or_path={llava_folder}")
    rewrite(here / "config.json", hidden_size=64)
    assert "hidden_size=64 instead of 32" in message_of(words, folder, f"--model_name_or_path={here}")


def test_base_that_is_gone_is_asked_for(adapter):
    folder = adapter()
    rewrite(folder / "adapter_config.json", base_model_name_or_path="/gone/llava")
    said = message_of(words, folder)
    assert "/gone/llava" in said and "--model_name_or_path" in said


def test_adapter_in_the_place_of_a_model_is_refused_with_the_flag_for_it(adapter, llava_folder):
    for kind, named in (("mixlora", "a MixLoRA adapter"), ("lora", "an adapter of type LORA")):
        folder = adapter(kind)
        said = message_of(check_is_no_adapter, {"model_name_or_path": str(folder)})
        assert named in said and f"--mixlora_init_from {folder}" in said and str(llava_folder) in said
    check_is_no_adapter({"model_name_or_path": str(llava_folder)})
    check_is_no_adapter({"model_name_or_path": "lmsys/vicuna-7b-v1.5"})


def test_form_of_the_method_is_the_adapters(adapter):
    folder = adapter()
    config, found = continued_config(folder, {"r": 2, "lora_dropout": 0.3, "num_factors": None}), read_config(folder)
    assert config.lora_dropout == 0.3 and not config.inference_mode and config.base_model_name_or_path is None
    others = {"lora_dropout", "inference_mode", "base_model_name_or_path"}
    assert all(getattr(config, name) == getattr(found, name) for name in found.to_dict() if name not in others)


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("num_factors", 8, "mixlora_num_factors"),
        ("r", 3, "lora_r"),
        ("lora_alpha", 16, "lora_alpha"),
        ("pairing", "same", "mixlora_pairing"),
        ("routing", "ifs", "mixlora_routing"),
        ("router_input", "words", "mixlora_router_input"),
        ("router_scope", "sequence", "mixlora_router_scope"),
        ("cfs", "table", "mixlora_cfs"),
        ("cfs_temperature", 0.5, "mixlora_cfs_temperature"),
        ("bias", "all", "lora_bias"),
    ],
)
def test_other_form_is_refused_with_field_both_values_and_the_way_out(adapter, field, value, flag):
    folder = adapter()
    said = message_of(continued_config, folder, {field: value})
    assert f"--{flag} {value}" in said and f"{field}={getattr(read_config(folder), field)!r}" in said
    assert f"leave --{flag} out" in said


def test_tasks_keep_the_factors_that_they_have(adapter):
    folder = adapter("tasks")
    assert given_flags(words(folder))["mixlora_task_loss_weight"] == "0.1"
    assert continued_config(folder, {"task_loss_weight": 0.2}).tasks == ["ocr", "vqa"]
    assert continued_tasks(folder, ["vqa"]) == ["ocr", "vqa"]
    assert "'counting' is none" in message_of(continued_tasks, folder, ["counting", "vqa"])
    assert "tasks=None" in message_of(continued_tasks, adapter(), ["vqa"])


def fresh(base, folder, **other):
    config = continued_config(folder, {})
    for name, value in other.items():
        setattr(config, name, value)
    model = get_peft_model(plain(base), config)
    return model


def test_all_that_was_learnt_goes_on(adapter, llava_folder, tmp_path):
    folder = adapter()
    model = fresh(llava_folder, folder)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    take_over(model, folder)
    assert trains == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(tmp_path / "again")
    learnt, kept = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert learnt.keys() == kept.keys() and any("mixlora_stats_moments" in name for name in learnt)
    assert all(torch.equal(learnt[name], kept[name]) for name in learnt)
    projector = model.get_base_model().state_dict()
    assert all(torch.equal(projector[name], tensor) for name, tensor in read_non_lora_trainables(folder).items())


def test_centre_of_words_goes_on(llava_folder, tmp_path):
    folder = write_adapter(llava_folder, tmp_path / "words", router_input="words", pairing="same", routing="ifs")
    model = fresh(llava_folder, folder)
    take_over(model, folder)
    model.save_pretrained(tmp_path / "again")
    learnt, kept = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    (centre,) = [name for name in learnt if "mixlora_stats_words" in name]
    assert learnt[centre][-1] == 12 and torch.equal(learnt[centre], kept[centre])


def test_adapter_stored_in_bfloat16_stays_so(adapter, llava_folder):
    folder = adapter()
    model = fresh(llava_folder, folder)
    before = {name: parameter for name, parameter in model.named_parameters() if "mixlora_" in name}
    for parameter in before.values():
        parameter.data = parameter.data.to(torch.bfloat16)
    take_over(model, folder)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter and parameter.dtype == torch.bfloat16 for name, parameter in before.items())


def test_plain_lora_brings_its_projector_and_says_what_is_left_behind(adapter, llava_folder, capsys):
    folder = adapter("lora")
    model = fresh(llava_folder, adapter())
    take_over(model, folder)
    assert "is a plain LoRA: its projector goes on and its own weights do not" in capsys.readouterr().out
    state = model.get_base_model().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in read_non_lora_trainables(folder).items())


def test_adapter_of_other_layers_is_refused(adapter, llava_folder):
    folder = adapter()
    model = fresh(llava_folder, folder, target_modules={"q_proj"})
    said = message_of(take_over, model, folder)
    assert "down_proj" in said and "missing" in said and "another base, or on other layers" in said


def test_projector_of_another_tower_is_refused(adapter, llava_folder):
    folder = adapter()
    model = fresh(llava_folder, folder)
    model.get_base_model().get_model().mm_projector[0] = nn.Linear(24, 32)
    said = message_of(take_over, model, folder)
    assert "mm_projector.0.weight of shape (32, 16)" in said and "one of shape (32, 24)" in said


def test_card_names_the_adapter_and_its_weights(adapter, tmp_path):
    folder = adapter()
    assert description_of(folder).startswith("mixlora (sha256 of adapter_model.safetensors: ")
    (tmp_path / "run").mkdir()
    assert description_of(folder.rename(tmp_path / "run" / "checkpoint-3")).startswith("run/checkpoint-3 (")
