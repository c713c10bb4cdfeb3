"""The flags of `llava.train.train` and the adapter that they describe."""

import json
import pickle
import sys

import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from llava_mixlora.patches.llava_train import _train_checked
from peft import LoraConfig
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor, TrainingArguments

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL

from ..tiny import draw_pictures, layers, message_of


@pytest.fixture
def parse(patched, tmp_path):
    """Parses flags as upstream's train() does."""
    from llava.train import train

    def parse(*flags):
        parser = transformers.HfArgumentParser(train.TrainingArguments)
        (arguments,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *flags])
        return arguments

    return parse


def test_flags_become_the_configuration(parse):
    arguments = parse(
        *("--mixlora_enable", "--lora_r", "3", "--lora_alpha", "24", "--lora_dropout", "0.1"),
        *("--mixlora_num_factors", "8", "--mixlora_routing", "ifs", "--mixlora_router_gradient", "none"),
        *("--mixlora_router_scope", "sequence", "--mixlora_decode_routing", "step"),
    )
    expected = MixLoraConfig(
        r=3,
        lora_alpha=24,
        lora_dropout=0.1,
        num_factors=8,
        routing="ifs",
        router_gradient="none",
        router_scope="sequence",
        decode_routing="step",
        target_modules=["q_proj"],
        exclude_modules=NOT_THE_LANGUAGE_MODEL,
        task_type="CAUSAL_LM",
    )
    assert arguments.mixlora_config(["q_proj"]).to_dict() == expected.to_dict()


def test_further_forms_are_flags(parse):
    config = parse(
        *("--mixlora_enable", "--mixlora_pairing", "same", "--mixlora_router_init", "zero"),
        *("--mixlora_router_input", "words", "--mixlora_router_scope", "instruction"),
    ).mixlora_config()
    expected = MixLoraConfig(pairing="same", router_init="zero", router_input="words", router_scope="instruction")
    for name in ("pairing", "routing", "router_init", "router_input", "router_scope"):
        assert getattr(config, name) == getattr(expected, name)
    config = parse("--mixlora_enable", "--mixlora_cfs", "table", "--mixlora_cfs_temperature", "0.5").mixlora_config()
    assert config.cfs == "table" and config.cfs_temperature == 0.5


def test_balance_loss_weight_is_a_flag(parse):
    assert parse("--mixlora_enable", "--mixlora_balance_loss_weight", "0.5").mixlora_config().balance_loss_weight == 0.5
    assert parse("--mixlora_enable", "--mixlora_unknown_prompt", "error").mixlora_config().unknown_prompt == "error"
    with pytest.raises(MixLoraError, match="leaves none to train"):
        parse("--mixlora_enable", "--mixlora_preset", "paper", "--mixlora_balance_loss_weight", "0.5")


def test_flags_that_are_not_given_keep_the_defaults(parse):
    config, default = parse("--mixlora_enable", "--lora_r", "4").mixlora_config(), MixLoraConfig()
    others = {"r", "lora_alpha", "lora_dropout", "exclude_modules", "task_type"}  # LLaVA's, or what a LLaVA needs
    for name in set(default.to_dict()) - others:
        assert getattr(config, name) == getattr(default, name), name


def test_enabling_mixlora_enables_upstreams_lora_branch(parse):
    assert parse("--mixlora_enable").lora_enable
    assert not parse().lora_enable


def test_pools_are_never_smaller_than_the_rank(parse):
    assert parse("--mixlora_enable", "--lora_r", "64").mixlora_config().num_factors == 64


def test_paper_preset_is_the_paper_configuration(parse):
    config = parse("--mixlora_enable", "--mixlora_preset", "paper", "--lora_r", "4").mixlora_config()
    paper = MixLoraConfig.paper(r=4)
    for name in ("router_gradient", "router_scope", "count_padding", "decode_routing", "cfs_product"):
        assert getattr(config, name) == getattr(paper, name)
    assert config.count_padding


def test_other_flags_override_the_preset(parse):
    flags = ("--mixlora_enable", "--mixlora_preset", "paper", "--mixlora_router_gradient", "straight_through")
    config = parse(*flags).mixlora_config()
    assert config.router_gradient == "straight_through" and config.count_padding


@pytest.mark.parametrize("given, expected", [("none", "none"), ("all", "all"), ("lora_only", "mixlora_only")])
def test_bias_flag_keeps_its_meaning(parse, given, expected):
    assert parse("--mixlora_enable", "--lora_bias", given).mixlora_config().bias == expected


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lora_r", "9", "--mixlora_num_factors", "8"], "r=9"),
        (["--mixlora_num_factors", "-1"], "num_factors=-1"),
        (["--mixlora_num_factors", "0"], "num_factors=0"),
        (["--mixlora_routing", "best"], "routing='best'"),
        (["--mixlora_preset", "papier"], "mixlora_preset='papier'"),
        (["--lora_dropout", "1.5"], "lora_dropout=1.5"),
        (["--lora_bias", "some"], "bias='some'"),
        (["--mixlora_pairing", "score"], "pairing='score'"),
        (["--mixlora_router_input", "image"], "router_input='image'"),
        (["--mixlora_router_init", "one"], "router_init='one'"),
        (["--mixlora_cfs", "no"], "cfs='no'"),
        (["--mixlora_cfs_temperature", "0"], "cfs_temperature=0"),
        (["--mixlora_task_loss_weight", "-1"], "task_loss_weight=-1"),
    ],
)
def test_bad_flag_is_named_before_anything_is_loaded(parse, flags, named):
    with pytest.raises(MixLoraError, match=named):
        parse("--mixlora_enable", *flags)


def test_bad_mixlora_values_do_not_matter_without_mixlora(parse):
    assert not parse("--lora_enable", "--lora_r", "64").mixlora_enable


def test_local_rank_is_the_launchers(parse, monkeypatch):
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    try:
        arguments = parse()
        if not torch.distributed.is_initialized():
            pytest.skip("transformers 4.37 does not count one process as many")
        assert arguments.local_rank == 0  # train() saves where it is 0 or -1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def evaluation_strategy(arguments):
    return arguments.eval_strategy if hasattr(arguments, "eval_strategy") else arguments.evaluation_strategy


def test_flags_that_transformers_renamed_still_work(parse):
    arguments = parse("--evaluation_strategy", "steps", "--eval_steps", "5", "--warmup_ratio", "0.03")
    assert evaluation_strategy(arguments) == "steps"
    assert arguments.get_warmup_steps(1000) == 30
    assert parse("--save_safetensors", "True").save_safetensors


@pytest.mark.skipif(not hasattr(TrainingArguments, "eval_strategy"), reason="transformers 4.37 has the old name")
def test_new_names_work_without_the_old_ones(parse):
    arguments = parse("--eval_strategy", "steps", "--eval_steps", "5", "--warmup_steps", "7")
    assert arguments.eval_strategy == "steps" and arguments.get_warmup_steps(1000) == 7


def test_training_arguments_pickle_by_upstreams_name(parse, tmp_path):
    arguments = parse("--mixlora_enable", "--mixlora_routing", "ifs")
    assert b"llava.train.train" in pickle.dumps(arguments)
    torch.save(arguments, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.mixlora_routing == "ifs"


@pytest.fixture
def train(patched, llama, tmp_path, monkeypatch, data):
    """Runs the patched train() around a body that stands for upstream's, with the given flags."""
    from llava.train import train as upstream

    def run(*flags, attention=None):
        made = {}

        def body(attn_implementation=None):
            made["attention"] = attn_implementation
            parser = transformers.HfArgumentParser(upstream.TrainingArguments)
            arguments, _ = parser.parse_args_into_dataclasses(return_remaining_strings=True)
            config = LoraConfig(r=arguments.lora_r, target_modules=["q_proj"], task_type="CAUSAL_LM")
            made["model"] = peft.get_peft_model(llama, config)

        words = ["--output_dir", str(tmp_path), "--data_path", data, "--use_cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        _train_checked(body)(attn_implementation=attention)
        return made

    return run


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]')
    return str(path)


def test_train_gets_a_mixlora_adapter_on_upstreams_target_modules(train, data):
    flags = ("--mixlora_enable", "--lora_r", "2", "--mixlora_num_factors", "5", "--data_path", data)
    model = train(*flags)["model"]
    assert model.peft_config["default"].peft_type == "MIXLORA"
    adapted = layers(model)
    assert len(adapted) == 2 and all(name.endswith("q_proj") for name in adapted)
    assert all(layer.mixlora_A["default"].shape[0] == 5 for layer in adapted.values())


def test_train_without_the_flag_gets_upstreams_lora(train):
    model = train("--lora_enable", "--lora_r", "2")["model"]
    assert model.peft_config["default"].peft_type == "LORA" and not layers(model)


def test_flags_are_forgotten_after_training(train, data, copy_of, _llama):
    train("--mixlora_enable", "--lora_r", "2", "--data_path", data)
    later = peft.get_peft_model(copy_of(_llama), LoraConfig(r=2, target_modules=["q_proj"]))
    assert later.peft_config["default"].peft_type == "LORA"


def test_flags_are_forgotten_after_training_fails(train, copy_of, _llama):
    with pytest.raises(MixLoraError):
        train("--mixlora_enable", "--lora_r", "2", "--data_path", "missing.json")
    later = peft.get_peft_model(copy_of(_llama), LoraConfig(r=2, target_modules=["q_proj"]))
    assert later.peft_config["default"].peft_type == "LORA"


def test_bad_data_is_named_before_training_starts(train):
    with pytest.raises(MixLoraError, match="missing.json: no such file"):
        train("--mixlora_enable", "--data_path", "missing.json")


def test_missing_flash_attention_falls_back(train):
    assert train("--lora_enable", "--lora_r", "2", attention="flash_attention_2")["attention"] == "sdpa"
    assert train("--lora_enable", "--lora_r", "2", attention="eager")["attention"] == "eager"
    assert train("--lora_enable", "--lora_r", "2")["attention"] is None


def test_flash_attention_that_can_be_had_is_used(train, monkeypatch, capsys):
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)  # as on a GPU
    flags = ("--lora_enable", "--lora_r", "2")
    assert train(*flags, attention="flash_attention_2")["attention"] == "flash_attention_2"
    assert "flash-attn" not in capsys.readouterr().out


def test_parsing_flags_outside_of_training_changes_no_adapter(parse, llama):
    parse("--mixlora_enable")
    model = peft.get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.peft_config["default"].peft_type == "LORA"


def test_vision_tower_and_projector_are_never_adapted(parse, llava):
    config = parse("--mixlora_enable", "--lora_r", "2").mixlora_config(["q_proj", "k_proj", "v_proj"])
    names = layers(peft.get_peft_model(llava, config))
    assert len(names) == 6 and all(".layers." in name and "vision_tower" not in name for name in names)


WITH_TASKS = ("--mixlora_enable", "--mixlora_routing", "ifs", "--lora_r", "2", "--mixlora_task_loss_weight", "0.1")


@pytest.fixture
def labelled(tmp_path):
    """Writes data of two tasks, text and pictures in turn, each with a longer question; `change` edits the samples."""
    draw_pictures(tmp_path, 8)

    def write(change=lambda samples: None):
        samples = []
        for number in range(8):
            question = ("<image>\n" if number % 2 else "") + "what color is red" + " and green" * number
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
            task = "vqa" if number % 3 == 0 else "ocr"
            sample = {"id": f"s{number}", "task": task, "conversations": turns}
            samples.append({**sample, "image": f"{number}.png"} if number % 2 else sample)
        change(samples)
        (tmp_path / "labelled.json").write_text(json.dumps(samples))
        return ("--data_path", str(tmp_path / "labelled.json"), "--image_folder", str(tmp_path))

    return write


@pytest.fixture
def batches(patched, clip_folder, tokenizer_folder, tmp_path, monkeypatch):
    """The batches that upstream's data, collator and trainer make, inside of train()."""
    from llava.train import train as upstream

    def run(*flags):
        made = []

        def body(attn_implementation=None):
            parser = transformers.HfArgumentParser((upstream.DataArguments, upstream.TrainingArguments))
            data_args, training_args = parser.parse_args_into_dataclasses()
            data_args.image_processor = CLIPImageProcessor.from_pretrained(clip_folder)
            data_args.is_multimodal, data_args.mm_use_im_start_end = True, False
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False, model_max_length=1024)
            tokenizer.pad_token = tokenizer.unk_token
            module = upstream.make_supervised_data_module(tokenizer=tokenizer, data_args=data_args)
            trainer = upstream.LLaVATrainer(model=nn.Linear(1, 1), tokenizer=tokenizer, args=training_args, **module)
            made.extend(trainer.get_train_dataloader())

        words = ["--output_dir", str(tmp_path / "output"), "--use_cpu", "--report_to", "none", *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", "--per_device_train_batch_size", "2", *words])
        _train_checked(body)()
        return made

    return run


@pytest.mark.parametrize("order", [(), ("--group_by_modality_length", "True")], ids=["shuffled", "by modality"])
@pytest.mark.parametrize(
    "loading", [("--dataloader_num_workers", "2"), ("--lazy_preprocess", "False")], ids=["workers", "not lazy"]
)
def test_batches_tell_the_task_of_each_sample(batches, labelled, order, loading):
    of_text, of_pictures = [], []
    for batch in batches(*WITH_TASKS, *labelled(), *order, *loading):
        assert batch.keys() == {"input_ids", "labels", "attention_mask", "images", "mixlora_tasks"}
        assert batch["mixlora_tasks"].dtype == torch.int64 and batch["mixlora_tasks"].shape == (2,)
        for ids, mask, task in zip(batch["input_ids"], batch["attention_mask"], batch["mixlora_tasks"].tolist()):
            (of_pictures if -200 in ids else of_text).append((mask.sum().item(), task))
    assert [task for _, task in sorted(of_text)] == [1, 0, 0, 1]
    assert [task for _, task in sorted(of_pictures)] == [0, 1, 0, 0]
    assert len({length for length, _ in of_text}) == len({length for length, _ in of_pictures}) == 4


@pytest.mark.parametrize(
    "flags",
    [
        ("--mixlora_enable", "--lora_r", "2"),
        ("--mixlora_enable", "--lora_r", "2", "--mixlora_task_loss_weight", "0"),
        ("--lora_enable", "--lora_r", "2", "--mixlora_task_loss_weight", "0.1"),
    ],
    ids=["no weight", "weight 0", "LoRA"],
)
def test_batches_without_a_task_loss_are_upstreams(batches, labelled, flags):
    made = batches(*flags, *labelled())
    assert len(made) == 4
    assert all(batch.keys() == {"input_ids", "labels", "attention_mask", "images"} for batch in made)


def test_data_needs_no_tasks_without_a_task_loss(batches, labelled):
    def drop(samples):
        for sample in samples:
            del sample["task"]

    assert len(batches("--mixlora_enable", "--lora_r", "2", *labelled(drop))) == 4


def test_adapter_knows_the_tasks_of_the_data(train, labelled):
    config = train(*WITH_TASKS, *labelled())["model"].peft_config["default"]
    assert config.task_loss_weight == 0.1 and config.tasks == ["ocr", "vqa"]


def test_tasks_are_forgotten_after_training(train, labelled, parse):
    train(*WITH_TASKS, *labelled())
    assert "needs to know the tasks" in message_of(parse, *WITH_TASKS)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda samples: samples[5].pop("task"), "labelled.json: sample 's5' has no field 'task'"),
        (lambda samples: samples[5].update(task=None), "sample 's5' has a 'task' of type NoneType"),
        (lambda samples: [samples[5].pop(field) for field in ("id", "task")], "labelled.json: sample 5 has no field"),
    ],
)
def test_sample_without_a_task_is_named_before_the_model_is_loaded(train, labelled, monkeypatch, change, named):
    monkeypatch.setattr(peft, "get_peft_model", None)  # train() has a model when it calls this
    assert named in message_of(train, *WITH_TASKS, *labelled(change))


def test_columns_that_would_be_removed_are_refused(train, labelled):
    message = message_of(train, *WITH_TASKS, *labelled(), "--remove_unused_columns", "True")
    assert message.startswith("--remove_unused_columns True")


def test_more_tasks_than_subsets_are_refused(train, labelled):
    def divide(samples):
        for number, sample in enumerate(samples):
            sample["task"] = f"task {number}"

    assert "8 of them" in message_of(train, *WITH_TASKS, "--mixlora_num_factors", "4", *labelled(divide))
