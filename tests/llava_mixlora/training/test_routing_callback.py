"""Routing figures in the logs of a real Trainer."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from llava_mixlora.method.routing_statistics import dead_share, router_entropy, usage_balance
from llava_mixlora.training.routing_callback import RoutingCallback, add_routing_callback

from ...tiny import layers, paper_form, random_ids, randomise

KEYS = {f"mixlora_{name}_{pool}" for name in ("router_entropy", "dead_share", "usage_balance") for pool in "AB"}


class Reporter(TrainerCallback):
    """What a logging service would be sent, and the state of the model at that time."""

    def __init__(self):
        self.logs, self.usage = [], []

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        self.logs.append(dict(logs))
        self.usage.append(torch.stack([layer.mixlora_stats_usage["default"] for layer in layers(model).values()]))


class Watcher(TrainerCallback):
    """The routers' entropy in every batch."""

    def __init__(self):
        self.entropies = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        routes = [layer.last_routes["default"] for layer in layers(model).values()]
        pools = [route.score_A for route in routes], [route.score_B for route in routes]
        self.entropies.append([router_entropy(torch.stack(scores)).mean().item() for scores in pools])

    on_substep_end = on_step_end


@pytest.fixture
def trainer(llama, tmp_path):
    def build(callbacks, mixlora=True, routing="ifs_cfs", pairing="rank", add=True, **options):
        options = {"report_to": "none", "save_strategy": "no", "max_steps": 4, "logging_steps": 2, **options}
        if mixlora:
            config = paper_form(r=2, num_factors=6, routing=routing, pairing=pairing, task_type="CAUSAL_LM")
            model = randomise(get_peft_model(llama, config))
        else:
            model = llama
        rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 5)]
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True, **options
        )
        built = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
        if add:
            add_routing_callback(built)
        return built

    return build


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_logs_tell_what_happened_since_the_log_before(trainer, gradient_accumulation_steps, gradient_checkpointing):
    reporter, watcher = Reporter(), Watcher()
    built = trainer(
        [reporter, watcher],
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
    )
    built.model.enable_input_require_grads()
    built.train()
    first, second = [logs for logs in reporter.logs if "loss" in logs]
    assert set(first) > KEYS and set(second) > KEYS
    assert reporter.usage[0].sum() == 14 * 2 * 2 * 4 * gradient_accumulation_steps
    since = reporter.usage[1] - reporter.usage[0]
    for column, pool in enumerate("AB"):
        assert second[f"mixlora_dead_share_{pool}"] == pytest.approx(dead_share(since)[:, column].mean().item())
        assert second[f"mixlora_usage_balance_{pool}"] == pytest.approx(usage_balance(since)[:, column].mean().item())
        seen = [entropies[column] for entropies in watcher.entropies]
        seen = seen[len(seen) // 2 :]
        assert len(seen) == 2 * gradient_accumulation_steps
        assert second[f"mixlora_router_entropy_{pool}"] == pytest.approx(sum(seen) / len(seen))


def test_history_holds_the_figures_too(trainer):
    built = trainer([])
    built.train()
    assert all(set(entry) > KEYS for entry in built.state.log_history if "loss" in entry)


def test_only_training_logs_have_figures(trainer):
    reporter = Reporter()
    strategy = "eval_strategy" if hasattr(TrainingArguments, "eval_strategy") else "evaluation_strategy"
    trainer([reporter], **{strategy: "steps"}, eval_steps=2).train()
    others = [logs for logs in reporter.logs if "loss" not in logs]
    assert any("eval_loss" in logs for logs in others) and any("train_runtime" in logs for logs in others)
    assert not any("mixlora" in key for logs in others for key in logs)


def test_random_routing_has_no_router_to_tell_of(trainer):
    reporter = Reporter()
    trainer([reporter], routing="random").train()
    assert "mixlora_dead_share_A" in reporter.logs[0] and "mixlora_router_entropy_A" not in reporter.logs[0]


@pytest.mark.parametrize("routing", ["ifs", "random"])
def test_one_choice_for_both_pools_is_logged_once_as_pool_a(trainer, routing):
    reporter = Reporter()
    trainer([reporter], routing=routing, pairing="same").train()
    logs = [logs for logs in reporter.logs if "loss" in logs][1]
    entropy = {"mixlora_router_entropy_A"} if routing == "ifs" else set()
    assert {key for key in logs if "mixlora" in key} == {"mixlora_dead_share_A", "mixlora_usage_balance_A"} | entropy
    since = (reporter.usage[1] - reporter.usage[0])[:, 0]
    assert logs["mixlora_dead_share_A"] == pytest.approx(dead_share(since).mean().item())


def test_second_run_starts_anew(trainer):
    reporter = Reporter()
    built = trainer([reporter], max_steps=2)
    built.train()
    built.train()
    first, second = [logs for logs in reporter.logs if "loss" in logs]
    one_run = reporter.usage[-1] - reporter.usage[0]
    assert second["mixlora_dead_share_A"] == pytest.approx(dead_share(one_run)[:, 0].mean().item())


def test_callback_is_there_once_and_first(trainer):
    built = trainer([Reporter(), RoutingCallback()])
    add_routing_callback(built)
    positions = [isinstance(callback, RoutingCallback) for callback in built.callback_handler.callbacks]
    assert positions[0] and sum(positions) == 1


@pytest.mark.parametrize("late", [False, True])
def test_callback_of_a_plain_trainer_moves_before_its_reporters(trainer, late):
    reporter, callback = Reporter(), RoutingCallback()
    built = trainer([reporter] if late else [reporter, callback], add=False)
    if late:
        built.add_callback(callback)
    order = list(built.callback_handler.callbacks)
    built.train()
    assert built.callback_handler.callbacks == [callback, *(each for each in order if each is not callback)]
    assert (built.callback_handler.callbacks == order) is not late
    logs = [logs for logs in reporter.logs if "loss" in logs]
    assert len(logs) == 2 and all(set(entry) > KEYS for entry in logs)


def test_moving_to_the_front_leaves_no_other_callback_out(trainer):
    calls = []

    class Noting(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_train_begin(self, *args, **kwargs):
            calls.append(self.name)

    built = trainer([Noting("before")], add=False, max_steps=1)
    for callback in (RoutingCallback(), Noting("after")):
        built.add_callback(callback)
    built.train()
    assert calls == ["before", "after"]


def test_callback_says_that_a_model_has_no_adapter(trainer):
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no MixLoRA layers"):
        trainer([RoutingCallback()], mixlora=False, max_steps=1).train()


def test_model_without_an_adapter_has_no_callback(trainer):
    built = trainer([], mixlora=False)
    assert not any(isinstance(callback, RoutingCallback) for callback in built.callback_handler.callbacks)
