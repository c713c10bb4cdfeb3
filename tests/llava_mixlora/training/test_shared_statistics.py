"""Counts of a Trainer's processes; those of several are in tests/end_to_end/test_many_processes.py."""

import multiprocessing

import pytest
from peft import get_peft_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from llava_mixlora import MixLoraConfig
from llava_mixlora.training.shared_statistics import SharedStatistics, share_statistics

from ...tiny import layers, random_ids


@pytest.fixture
def trainer(llama, tmp_path):
    def build(mixlora=True):
        config = MixLoraConfig(r=2, num_factors=6, task_type="CAUSAL_LM")
        model = get_peft_model(llama, config) if mixlora else llama
        rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 5)]
        options = {"report_to": "none", "save_strategy": "no", "max_steps": 2, "disable_tqdm": True, "use_cpu": True}
        built = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows)
        share_statistics(built)
        return built

    return build


@pytest.fixture
def process_group():
    """A real group, of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def callbacks_of(trainer):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, SharedStatistics)]


def test_callback_is_added_once(trainer):
    built = trainer()
    share_statistics(built)
    assert len(callbacks_of(built)) == 1


def test_model_without_an_adapter_has_no_callback(trainer):
    assert not callbacks_of(trainer(mixlora=False))


def test_one_process_counts_as_it_did(trainer):
    built = trainer()
    built.train()
    for layer in layers(built.model).values():
        assert layer.mixlora_stats_usage["default"].sum(dim=1).tolist() == [2 * 2 * 8] * 2  # r, steps, instances


def test_data_parallelism_leaves_the_counts_to_each_process(trainer, process_group):
    model = trainer().model
    names = [name for name, _ in model.named_buffers() if "mixlora_stats" in name]
    broadcast = {id(buffer) for buffer in DistributedDataParallel(model).modules_buffers}
    assert len(names) == 2 * 14 and broadcast
    assert not any(id(buffer) in broadcast for name, buffer in model.named_buffers() if name in names)


def count_two_steps(rank, model, meeting, results):
    """In one of two processes: 100 from a run that goes on, then 1 or 2 a step; what the model has after each step."""
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    counts = [layer.mixlora_stats_usage["default"] for layer in layers(model).values()]
    counts += [moment for layer in layers(model).values() for moment in layer.moments("default")]
    for count in counts:
        count += 100
    callback = SharedStatistics()
    callback.on_train_begin(None, None, None, model)
    for _ in range(2):
        for count in counts:
            count += 1 + rank
        callback.on_step_end(None, None, None, model)
        results.put({number for count in counts for number in count.flatten().tolist()})
    distributed.destroy_process_group()


def test_counts_of_the_processes_add_up_and_loaded_counts_do_not(trainer, tmp_path):
    context, model = multiprocessing.get_context("fork"), trainer().model
    results = [context.SimpleQueue() for _ in range(2)]
    processes = [
        context.Process(target=count_two_steps, args=(rank, model, tmp_path / "meeting", results[rank]))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [[queue.get(), queue.get()] for queue in results] == [[{103}, {106}]] * 2
