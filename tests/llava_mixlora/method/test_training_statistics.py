"""What training sums for static cores: every attended position once, whatever the way of training."""

import copy
import threading
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llava_mixlora.method import training_statistics
from llava_mixlora.method.mixture import core
from llava_mixlora.method.static_core import instance_moments
from llava_mixlora.method.training_statistics import Statistics, TrainingStatistics

from ...tiny import layers, paper_form, random_ids, randomise

E, R = 6, 2
CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def adapt(model, **options):
    options = {"r": R, "num_factors": E, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    return randomise(get_peft_model(model, paper_form(**options))).train()


def moments(model, adapter="default"):
    """[layers, 4, E, E]"""
    return torch.stack([torch.stack(list(layer.moments(adapter))) for layer in layers(model).values()]).clone()


def fresh_statistics(size):
    return Statistics(torch.zeros(2, size, dtype=torch.int64), torch.zeros(4, size, size, dtype=torch.int64))


def train(model, seed=0, rows=3, mask=None):
    ids = random_ids(rows, 7, seed=seed)
    return model(input_ids=ids, attention_mask=mask, labels=ids).loss


def summed_by_hand(model, mask=None, seed=0):
    """The moments of one batch, from the inputs that reach the layers and the routes that they take."""
    model, found = copy.deepcopy(model), {}
    for name, layer in layers(model).items():

        def note(layer, args, output, name=name):
            cores = core(layer.last_routes["default"], E, layer.scaling["default"], False, torch.float32)
            x, attended = args[0].detach(), torch.ones(3, 7) if mask is None else mask
            rows = [(x[b : b + 1, attended[b].bool()], cores[b : b + 1]) for b in range(3)]
            found[name] = sum(instance_moments(x @ layer.mixlora_A["default"].detach().t(), C) for x, C in rows)

        layer.register_forward_hook(note)
    train(model, mask=mask, seed=seed)
    return torch.stack([found[name] for name in layers(model)])


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["none", "reentrant", "non-reentrant"])
def test_accumulated_batches_count_once(llama, checkpointing):
    model = adapt(llama)
    expected = summed_by_hand(model) + summed_by_hand(model, seed=1)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    (train(model) + train(model, seed=1)).backward()
    torch.testing.assert_close(moments(model), expected, **CLOSE)


def test_padding_does_not_count(llama):
    model = adapt(llama)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    expected = summed_by_hand(model, mask)
    train(model, mask=mask)
    torch.testing.assert_close(moments(model), expected, **CLOSE)


def test_dropout_is_left_out(llama):
    model = adapt(llama, lora_dropout=0.5, target_modules=["q_proj"], layers_to_transform=[0])
    expected = summed_by_hand(model)
    train(model)
    torch.testing.assert_close(moments(model), expected, **CLOSE)


def test_nothing_but_training_is_summed(llama):
    model = adapt(llama)
    with torch.no_grad():
        train(model)
    train(model.eval())
    with model.disable_adapter():
        train(model.train())
    assert not moments(model).any()


def test_autocast_sums_in_float64(llama):
    model = adapt(llama)
    expected = summed_by_hand(model)
    with torch.autocast("cpu", torch.bfloat16):
        train(model)
    found = moments(model)
    assert found.dtype == torch.float64
    # Routes may differ in bfloat16, so only the layer that sees the same inputs.
    torch.testing.assert_close(found[0, 1], expected[0, 1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("most_numbers", [1, 500, training_statistics.MOST_NUMBERS])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_forward_that_fails_counts_in_no_layer(llama, monkeypatch, error, most_numbers):
    monkeypatch.setattr(training_statistics, "MOST_NUMBERS", most_numbers)
    model = adapt(llama)
    expected = summed_by_hand(model)

    def fail(*_):
        raise error

    handle = model.base_model.model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(error):
        train(model, seed=1)
    handle.remove()
    assert not moments(model).any()
    train(model)
    torch.testing.assert_close(moments(model), expected, **CLOSE)


def test_forward_of_another_thread_counts_for_itself(llama):
    """It runs as a whole within one that then fails."""
    model = adapt(llama)
    expected = summed_by_hand(model, seed=1)

    def run_another_and_fail(*_):
        handle.remove()
        thread = threading.Thread(target=train, args=(model, 1))
        thread.start()
        thread.join()
        raise ValueError

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(run_another_and_fail)
    with pytest.raises(ValueError):
        train(model)
    torch.testing.assert_close(moments(model), expected, **CLOSE)


def test_adapters_of_different_sizes_sum_as_each_does_alone(llama):
    model = adapt(llama)
    model.add_adapter("second", paper_form(r=1, num_factors=E + 1, task_type="CAUSAL_LM"))
    randomise(model, seed=2)
    both = copy.deepcopy(model)
    both.base_model.set_adapter(["default", "second"])
    train(both)
    for adapter, size in (("default", E), ("second", E + 1)):
        model.set_adapter(adapter)
        train(model)
        found, alone = moments(both, adapter), moments(model, adapter)
        assert found.shape == (14, 4, size, size)
        # The first layers see the same input whether or not the other adapter is active too.
        torch.testing.assert_close(found[:3], alone[:3], **CLOSE)
        assert found.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_many_layers_of_several_shapes_sum_as_each_does_alone(autocast):
    """One of them twice, as a layer that is run twice notes it; autocast around the model does not reach the sums."""
    generator, noted = torch.Generator().manual_seed(0), TrainingStatistics()
    found, expected = {}, {}
    for number in [*range(20), 0]:
        instances, positions, size = 1 + number % 3, 5 + number % 5, 2 + number % 2
        z = torch.randn(instances, positions, size, generator=generator, requires_grad=True)
        core = torch.randn(instances, size, size, generator=generator, requires_grad=True)
        attended = torch.rand(instances, positions, generator=generator) < 0.7 if number % 2 else None
        total = found.setdefault(number, fresh_statistics(size))
        noted.note(total, z, core, attended)
        expected[number] = expected.get(number, 0) + instance_moments(z, core, attended).detach()
    for _ in range(2):  # what has been added is not added again
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            noted.add()
        for number, total in found.items():
            torch.testing.assert_close(total.moments.view(torch.float64), expected[number])
            assert (total.usage == (2 if number == 0 else 1 + number % 3)).all()


def test_memory_of_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(training_statistics, "MOST_NUMBERS", 3 * (10 * E + E * E))
    noted, alive = TrainingStatistics(), weakref.WeakSet()
    for _ in range(20):
        z = torch.randn(1, 10, E)
        alive.add(z)
        noted.note(fresh_statistics(E), z, torch.randn(1, E, E), None)
        del z
        assert len(alive) < 3


@pytest.mark.parametrize("checkpointing", CHECKPOINTING[1:], ids=["reentrant", "non-reentrant"])
def test_what_a_checkpoint_frees_waits_within_the_bound(llama, monkeypatch, checkpointing):
    model, alive, counted = adapt(llama), weakref.WeakSet(), []
    monkeypatch.setattr(training_statistics, "MOST_NUMBERS", 1)
    note = TrainingStatistics.note

    def watch(self, total, z, *others):
        alive.add(z)
        counted.append(len(alive))
        note(self, total, z, *others)

    monkeypatch.setattr(TrainingStatistics, "note", watch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    train(model)
    assert counted == [1] * 14  # no layer's z lasts beyond the layer


def test_casts_of_the_model_change_no_bit(llama):
    model = adapt(llama)
    train(model)
    expected = moments(model)
    assert expected.any() and torch.equal(moments(model.bfloat16()), expected)
    assert torch.equal(moments(model.half().float()), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_moments_are_saved_as_numbers_and_summing_goes_on(llama, llama_folder, tmp_path, low_cpu_mem_usage):
    """Upstream's `train()` passes a state dict of parameters only."""
    model = adapt(llama)
    train(model)
    expected = moments(model)
    model.save_pretrained(tmp_path, state_dict={n: p for n, p in model.named_parameters() if "lora_" in n})
    saved = {name: t for name, t in load_file(tmp_path / "adapter_model.safetensors").items() if "moments" in name}
    assert len(saved) == 14 and all(tensor.dtype == torch.float64 for tensor in saved.values())
    base = LlamaForCausalLM.from_pretrained(llama_folder)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert torch.equal(moments(loaded), expected)
    train(loaded.train())
    torch.testing.assert_close(moments(loaded), 2 * expected, **CLOSE)


def test_adapter_saved_without_moments_loads(llama, llama_folder, tmp_path, recwarn):
    model = adapt(llama)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if "moments" not in name}, weights)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_folder), tmp_path)
    assert not moments(loaded).any()
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]


def test_deleted_adapter_takes_its_moments_along(llama):
    model = adapt(llama)
    model.add_adapter("second", paper_form(r=1, num_factors=E, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert all(list(layer.mixlora_stats_moments.keys()) == ["second"] for layer in layers(model).values())
