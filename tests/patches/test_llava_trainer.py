"""Upstream's `LLaVATrainer` with a MixLoRA adapter."""

import pytest
import torch
from llava_mixlora.patches.llava_trainer import split_router_groups
from peft import get_peft_model
from torch.utils.data import Dataset

from ..tiny import message_of, paper_form, random_ids

ROUTERS = ("mixlora_router_A", "mixlora_router_B", "mixlora_cfs")


class Conversations(Dataset):
    """Token ids with half of each row supervised."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = random_ids(6, seed=index)
        return {"input_ids": ids, "labels": torch.where(torch.arange(6) < 3, -100, ids)}

    @property
    def modality_lengths(self):
        return [6, -6] * 4


@pytest.fixture
def trainer(patched, llama, tmp_path):
    """A real LLaVATrainer, built as upstream's train() builds it."""
    from llava.train import llava_trainer, train

    def build(*, mixlora=None, **options):
        options = {"report_to": "none", "save_strategy": "no", "max_steps": 2, "learning_rate": 1e-2, **options}
        arguments = train.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True, **options
        )
        arguments.tune_mm_mlp_adapter = False
        config = paper_form(r=2, num_factors=4, task_type="CAUSAL_LM", **(mixlora or {}))
        model = get_peft_model(llama, config)
        dataset = Conversations()
        return llava_trainer.LLaVATrainer(
            model=model, tokenizer=None, args=arguments, train_dataset=dataset, eval_dataset=None
        )

    return build


def groups_by_kind(trainer):
    """(is a router, learning rate, weight decay) of every trained parameter by name."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }


def test_routers_get_their_own_learning_rate(trainer):
    rates = groups_by_kind(trainer(mixlora_router_lr=0.5, weight_decay=0.1))
    assert len(rates) == 14 * 5
    for name, (rate, decay) in rates.items():
        is_router = any(kind in name for kind in ROUTERS)
        assert rate == (0.5 if is_router else 1e-2), name
        assert decay == 0.1, name


def test_without_the_flag_all_share_one_learning_rate(trainer):
    rates = groups_by_kind(trainer())
    assert len(rates) == 14 * 5 and {rate for rate, _ in rates.values()} == {1e-2}


def test_optimizer_is_split_once(trainer):
    built = trainer(mixlora_router_lr=0.5)
    groups = len(built.create_optimizer().param_groups)
    assert len(built.create_optimizer().param_groups) == groups
    parameters = [id(p) for group in built.optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters))


def test_router_groups_keep_the_settings_of_their_origin():
    model = torch.nn.Module()
    model.mixlora_router_A, model.mixlora_A = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.AdamW(
        [{"params": [model.mixlora_A, model.mixlora_router_A], "weight_decay": 0.3, "betas": (0.5, 0.6)}], lr=1.0
    )
    split_router_groups(optimizer, model, 0.25)
    pools, routers = optimizer.param_groups
    assert pools["params"] == [model.mixlora_A] and pools["lr"] == 1.0
    assert routers["params"] == [model.mixlora_router_A] and routers["lr"] == 0.25
    assert routers["weight_decay"] == 0.3 and routers["betas"] == (0.5, 0.6)


@pytest.mark.parametrize("router_gradient", ["straight_through", "none"])
def test_training_moves_every_router_or_none(trainer, router_gradient):
    built = trainer(
        mixlora={"router_gradient": router_gradient, "init_weights": False}, mixlora_router_lr=0.1, weight_decay=0.1
    )
    before = {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}
    built.train()
    for name, parameter in built.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        if any(kind in name for kind in ROUTERS):
            assert moved == (router_gradient == "straight_through"), name
        else:
            assert moved == ("mixlora_" in name), name


def test_a_loss_that_is_no_number_stops_the_run_before_it_spoils_the_adapter(trainer):
    built = trainer(max_steps=3)
    next(parameter for name, parameter in built.model.named_parameters() if "norm" in name).data.fill_(float("nan"))
    assert "step 1: the loss is nan" in message_of(built.train)
    assert all(parameter.isfinite().all() for name, parameter in built.model.named_parameters() if "mixlora_" in name)


def test_steps_that_teach_nothing_are_named(trainer, monkeypatch, capsys):
    item = Conversations.__getitem__
    monkeypatch.setattr(
        Conversations, "__getitem__", lambda self, i: {**item(self, i), "labels": torch.full((6,), -100)}
    )
    trainer().train()
    assert "step 1: none of the 2 samples" in capsys.readouterr().out


def test_an_adapter_that_would_not_be_trained_is_refused(trainer, monkeypatch):
    model = get_peft_model

    def frozen(*args):
        return model(*args).requires_grad_(False)

    monkeypatch.setitem(globals(), "get_peft_model", frozen)
    assert "nothing of the MIXLORA adapter would be trained" in message_of(trainer)


def test_schedule_scales_the_routers_rate_too(trainer):
    built = trainer(mixlora_router_lr=0.5, warmup_steps=2, max_steps=4)
    built.train()
    assert sorted({group["initial_lr"] for group in built.optimizer.param_groups}) == [1e-2, 0.5]


def test_training_with_checkpointing_and_grouping_by_modality(trainer):
    built = trainer(group_by_modality_length=True, gradient_checkpointing=True)
    built.model.enable_input_require_grads()
    assert built.train().global_step == 2


def test_checkpoints_are_saved_and_resumed(trainer, tmp_path):
    trainer(save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    resumed = trainer(save_strategy="steps", save_steps=1, max_steps=3)
    assert resumed.train(resume_from_checkpoint=True).global_step == 3


def test_logs_tell_how_the_routers_use_the_factors(trainer):
    built = trainer(logging_steps=1)
    built.train()
    first = built.state.log_history[0]
    assert {"mixlora_router_entropy_A", "mixlora_dead_share_B", "mixlora_usage_balance_A"} < set(first)


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_balance_loss_joins_upstreams_training(trainer, gradient_accumulation_steps):
    def first_loss(weight):
        torch.manual_seed(0)
        options = {"max_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": gradient_accumulation_steps}
        built = trainer(mixlora={"balance_loss_weight": weight}, **options)
        built.train()
        built.model.unload()
        return built.state.log_history[0]["loss"]

    gained = first_loss(10.0) - first_loss(0.0)
    assert 9 < gained < 20  # the term is near 1 for fresh routers, and not that times the accumulated batches
