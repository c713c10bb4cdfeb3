"""Sharing statistics, as one process sees it; that several have those of one is in test_statistics_of_processes.py."""

import copy
import multiprocessing
import pickle

import pytest
from peft import get_peft_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from llava_mixlora import RoutingCallback, share_statistics
from llava_mixlora.training.shared_statistics import leave_to_each_process

from ...tiny import layers, message_of, paper_form, random_ids

IGNORED = "_ddp_params_and_buffers_to_ignore"
OTHERS = "base_model.model.lm_head.weight"


@pytest.fixture
def model(llama):
    return get_peft_model(llama, paper_form(r=2, num_factors=6, task_type="CAUSAL_LM"))


@pytest.fixture
def process_group():
    """A real group, of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def broadcast_statistics(module):
    """Names of the statistics that DistributedDataParallel would spread from the first process, and whether others."""
    names = list(DistributedDataParallel(module).named_module_buffers)
    assert any("inv_freq" in name for name in names)
    return [name for name in names if "mixlora_stats" in name]


def test_data_parallelism_leaves_the_counts_to_each_process(model, process_group):
    assert sum("mixlora_stats" in name for name, _ in model.named_buffers()) == 2 * 14
    for module in (model, model.base_model):
        assert broadcast_statistics(module) == []


def test_adapter_that_came_later_is_left_to_each_process_too(model, process_group):
    model.add_adapter("other", paper_form(r=2, num_factors=4, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    assert sum("mixlora_stats" in name for name, _ in model.named_buffers()) == 2 * 28
    assert broadcast_statistics(model) == []


def test_what_a_program_leaves_to_each_process_stays_so(model, process_group):
    model.get_base_model()._ddp_params_and_buffers_to_ignore = [OTHERS]
    assert OTHERS in getattr(model, IGNORED)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model.base_model, ["model.lm_head.weight"])
    assert "model.lm_head.weight" in DistributedDataParallel(model.base_model).parameters_to_ignore
    assert broadcast_statistics(model.base_model) == []
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [OTHERS])
    assert DistributedDataParallel(model).parameters_to_ignore == {OTHERS}
    leave_to_each_process(model)
    assert OTHERS in DistributedDataParallel(model).parameters_to_ignore and broadcast_statistics(model) == []


def test_module_around_a_model_can_be_told(model, process_group):
    around = nn.ModuleDict({"llm": model})
    assert len(broadcast_statistics(around)) == 2 * 14
    leave_to_each_process(around)
    assert broadcast_statistics(around) == []


def test_one_process_counts_as_it_did(model, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 5)]
    options = {"report_to": "none", "save_strategy": "no", "max_steps": 2, "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), **options)
    Trainer(model, arguments, train_dataset=rows, callbacks=[RoutingCallback()]).train()
    share_statistics(model)
    for layer in layers(model).values():
        assert layer.mixlora_stats_usage["default"].sum(dim=1).tolist() == [2 * 2 * 8] * 2  # r, steps, instances


def test_model_without_layers_is_refused(llama):
    assert "LlamaForCausalLM has no MixLoRA layers" in message_of(share_statistics, llama)


def add(model, number, adapter="default"):
    for layer in layers(model).values():
        layer.mixlora_stats_usage[adapter] += number
        for moment in layer.moments(adapter):
            moment += number


def found_in(model, adapter="default"):
    return {
        number
        for layer in layers(model).values()
        for sums in (layer.mixlora_stats_usage[adapter], *layer.moments(adapter))
        for number in sums.flatten().tolist()
    }


def in_two_processes(function, tmp_path, *args):
    """What `function(rank, *args)` returns in each of two processes of a group."""
    context = multiprocessing.get_context("fork")
    results = [context.SimpleQueue() for _ in range(2)]

    def work(rank):
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=rank, world_size=2)
        results[rank].put(function(rank, *args))
        distributed.destroy_process_group()

    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    return [queue.get() for queue in results]


def count_two_steps(rank, model):
    """100 from a run that goes on, then 1 or 2 a step; what the model has after each step."""
    add(model, 100)
    callback, found = RoutingCallback(), []
    callback.on_train_begin(None, None, None, model)
    for _ in range(2):
        add(model, 1 + rank)
        callback.on_step_end(None, None, None, model)
        found.append(found_in(model))
    return found


def test_counts_of_the_processes_add_up_and_loaded_counts_do_not(model, tmp_path):
    assert in_two_processes(count_two_steps, tmp_path, model) == [[{103}, {106}]] * 2


def count_and_replace(rank, model):
    """An adapter that is replaced by a fresh one of its name, beside one whose counts are loaded in the meantime."""
    model.add_adapter("other", paper_form(r=2, num_factors=4, task_type="CAUSAL_LM"))
    add(model, 10)
    share_statistics(model)
    model.base_model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", paper_form(r=2, num_factors=6, task_type="CAUSAL_LM"))
    add(model, 1 + rank)
    add(model, 50, "other")
    model.load_state_dict({name: value for name, value in model.state_dict().items() if "other" in name}, strict=False)
    add(model, 1 + rank, "other")
    share_statistics(model)
    share_statistics(model)
    return found_in(model), found_in(model, "other")


def test_adapter_in_the_place_of_another_starts_anew(model, tmp_path):
    assert in_two_processes(count_and_replace, tmp_path, model) == [({3}, {53})] * 2


def count_in_a_copy(rank, model):
    add(model, 10)
    share_statistics(model)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model.get_base_model()))
    found = []
    for each in copies:
        add(each, 1 + rank)
        each.load_state_dict(each.state_dict())
        add(each, 1 + rank)
        share_statistics(each)
        found.append(found_in(each))
    return [*found, found_in(model)]


def test_copy_of_a_model_knows_what_was_shared(model, tmp_path):
    # 20 were shared; what a process then loads into itself, 21 or 22, it takes for what all have.
    assert in_two_processes(count_in_a_copy, tmp_path, model) == [[{24}, {24}, {20}], [{25}, {25}, {20}]]
