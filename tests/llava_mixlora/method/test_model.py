"""MixLoRA through the whole surface that PEFT gives any method."""

import copy
import importlib
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from llava_mixlora import MixLoraConfig, MixLoraError, MixLoraLayer

from ...tiny import layers, message_of, newer_peft, paper_form, random_ids, randomise

IDS = random_ids(2, 6)
LINEAR_LAYERS = 14


def config(**options):
    return paper_form(**{"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})


def adapt(model, seed=0, **options):
    return randomise(get_peft_model(model, config(**options)), seed).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def reload(llama_folder):
    def reload(folder, **options):
        return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_folder), folder, **options).eval()

    return reload


@pytest.mark.parametrize("routing", ["ifs", "ifs_cfs", "random"])
def test_fresh_adapter_leaves_the_logits_bit_identical(llama, routing):
    expected = logits(llama)
    model = get_peft_model(llama, config(routing=routing)).eval()
    assert len(layers(model)) == LINEAR_LAYERS
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", [{}, {"routing": "ifs"}, {"routing": "random"}, {"router_gradient": "none"}])
def test_saving_and_loading_gives_the_same_logits_bit_for_bit(llama, reload, tmp_path, options, low_cpu_mem_usage):
    model = adapt(llama, **options)
    model.save_pretrained(tmp_path)
    loaded = reload(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].to_dict() == {
        **model.peft_config["default"].to_dict(),
        "inference_mode": True,
        "base_model_name_or_path": loaded.peft_config["default"].base_model_name_or_path,
    }


def test_adapter_file_holds_the_adapter_and_no_base_weight(llama, tmp_path):
    model = adapt(llama)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == LINEAR_LAYERS * 7
    assert all(".mixlora_" in name and "base_layer" not in name and "default" not in name for name in saved)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]


def test_reloaded_adapter_can_be_trained_on(llama, reload, tmp_path):
    adapt(llama).save_pretrained(tmp_path)
    frozen, trained = reload(tmp_path), reload(tmp_path, is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    trainable = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in trained.named_parameters() if "mixlora_" in name}


@pytest.mark.parametrize("router_gradient, kinds", [("straight_through", 5), ("none", 2)])
def test_trainable_are_the_adapters_parameters_only(llama, router_gradient, kinds):
    model = get_peft_model(llama, config(router_gradient=router_gradient))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == LINEAR_LAYERS * kinds and all("mixlora_" in name for name in trainable)


def test_frozen_routers_stay_frozen_when_the_adapter_is_set_again(llama, tmp_path, reload):
    model = adapt(llama, router_gradient="none")
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    model.save_pretrained(tmp_path)
    for each in (model, reload(tmp_path, is_trainable=True)):
        assert not any(p.requires_grad for n, p in each.named_parameters() if "router" in n or "cfs" in n)
        assert any(p.requires_grad for n, p in each.named_parameters() if "mixlora_A" in n)


def test_trainable_parameters_are_counted(llama, capsys):
    model = get_peft_model(llama, config(target_modules=["q_proj"]))
    model.print_trainable_parameters()
    expected = 2 * (6 * 32 + 6 * 32 + 6 * 32 * 2 + 2 * 6 * 32)
    assert f"trainable params: {expected:,}" in capsys.readouterr().out


# --- several adapters


def test_adapters_are_added_set_and_deleted(_llama, llama, copy_of):
    model = adapt(llama)
    first = logits(model)
    model.add_adapter("second", config(r=1, num_factors=3, routing="ifs"))
    assert torch.equal(logits(model), first)
    randomise(model, seed=1)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first)
    alone = get_peft_model(copy_of(_llama), config(r=1, num_factors=3, routing="ifs"), "second").eval()
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name="second"), "second")
    assert torch.equal(logits(alone), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in name for name, _ in model.named_parameters())
    assert all(set(layer.r) == set(layer.settings) == {"second"} for layer in layers(model).values())


def test_adapter_set_active_is_the_one_that_trains(llama):
    model = get_peft_model(llama, config())
    model.add_adapter("second", config(routing="ifs"))
    model.set_adapter("second")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("second" in name for name in trained)


def test_adapters_on_different_layers_do_not_touch_each_other(llama):
    model = get_peft_model(llama, config(target_modules=["q_proj"]))
    model.add_adapter("second", config(target_modules=["o_proj"]))
    for name, layer in layers(model).items():
        assert set(layer.r) == ({"default"} if name.endswith("q_proj") else {"second"})
    assert torch.isfinite(logits(model)).all()
    model.delete_adapter("second")
    assert logits(model).isfinite().all()


def test_adapters_are_loaded_beside_each_other(_llama, llama, copy_of, tmp_path):
    adapt(copy_of(_llama), seed=3).save_pretrained(tmp_path / "saved")
    expected = logits(adapt(copy_of(_llama), seed=3))
    model = adapt(llama)
    own = logits(model)
    model.load_adapter(tmp_path / "saved", "loaded")
    assert torch.equal(logits(model), own)
    model.set_adapter("loaded")
    assert torch.equal(logits(model), expected)


def test_each_adapter_is_saved_by_itself(llama, reload, tmp_path):
    model = adapt(llama)
    model.add_adapter("second", config(routing="ifs", num_factors=3))
    randomise(model, seed=1)
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    assert torch.equal(logits(reload(tmp_path / "second")), logits(model))


def test_inactive_adapter_is_deleted_without_a_trace(_llama, llama):
    model = adapt(llama, modules_to_save=["lm_head"])
    own, names = logits(model), set(model.state_dict())
    model.add_adapter("second", config(modules_to_save=["lm_head"], routing="ifs"))
    model.delete_adapter("second")
    assert torch.equal(logits(model), own) and set(model.state_dict()) == names
    with pytest.raises(ValueError, match="second"):
        model.delete_adapter("second")


@newer_peft
def test_adapter_is_not_added_twice_under_one_name(llama):
    model = adapt(llama)
    own = logits(model)
    with pytest.raises(ValueError, match="default"):
        model.add_adapter("default", config())
    assert torch.equal(logits(model), own)


def test_adapter_whose_name_is_part_of_anothers_is_saved_alone(llama, reload, tmp_path):
    model = adapt(llama)
    model.add_adapter("default_mixlora_A", config(routing="ifs"))
    randomise(model, seed=1)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == LINEAR_LAYERS * 7
    assert len(load_file(tmp_path / "default_mixlora_A" / "adapter_model.safetensors")) == LINEAR_LAYERS * 6
    assert torch.equal(logits(reload(tmp_path)), logits(model))


@newer_peft
def test_each_adapter_switches_to_the_module_saved_with_it(llama):
    model = adapt(llama, modules_to_save=["lm_head"])
    model.add_adapter("second", config(target_modules=["q_proj"]))
    model.add_adapter("third", config(modules_to_save=["lm_head"]))
    heads = model.base_model.model.lm_head
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        assert heads.active_adapters == ([name] if name != "second" else [])
        assert {n for n, p in heads.named_parameters() if p.requires_grad} == (
            {f"modules_to_save.{name}.weight"} if name != "second" else set()
        )


def test_only_one_adapter_may_train_biases(llama):
    model = get_peft_model(llama, config(bias="mixlora_only"))
    with pytest.raises(ValueError, match="bias"):
        model.add_adapter("second", config(bias="all"))


@newer_peft
def test_gradients_are_switched_by_adapter(llama):
    model = adapt(llama)
    model.add_adapter("second", config())
    model.set_requires_grad("second", True)
    model.set_requires_grad("default", False)
    assert all(p.requires_grad == ("second" in name) for name, p in model.named_parameters())


def test_disabled_adapter_is_the_base_bit_for_bit(_llama, llama):
    model = adapt(llama)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(_llama))
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), logits(_llama))
    assert not torch.allclose(logits(model), logits(_llama))


def test_disabling_an_adapter_that_trains_biases_warns(llama):
    model = get_peft_model(llama, config(bias="all"))
    with pytest.warns(UserWarning, match="bias.*'all'"), model.disable_adapter():
        pass


def test_unload_gives_the_base_back(_llama, llama):
    base = adapt(llama).unload()
    assert type(base) is LlamaForCausalLM and not layers(base)
    assert torch.equal(logits(base), logits(_llama))
    assert {n for n, _ in base.named_parameters()} == {n for n, _ in _llama.named_parameters()}


# --- one adapter per instance

BATCH = {"input_ids": random_ids(4, 6), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], *[[1] * 6] * 3])}
NAMES = ["__base__", "default", "second", "default"]


@pytest.fixture
def two(llama):
    """A model with two unlike adapters, each with a head of its own."""
    model = get_peft_model(llama, config(modules_to_save=["lm_head"]))
    model.add_adapter("second", config(modules_to_save=["lm_head"], r=1, num_factors=3, routing="ifs"))
    model.base_model.model.lm_head.modules_to_save["second"].weight.data.mul_(-1)
    return randomise(model).eval()


def one_by_one(model, run):
    """What `run` gives for every instance of BATCH when its adapter alone is active."""
    with model.disable_adapter():
        outputs = {"__base__": run(model)}
    for name in ("second", "default"):
        model.set_adapter(name)
        outputs[name] = run(model)
    return [outputs[name][instance] for instance, name in enumerate(NAMES)]


def test_every_instance_takes_the_adapter_that_is_named_for_it(two):
    expected = one_by_one(two, lambda model: model(**BATCH).logits)
    two.set_adapter("second")
    mixed = two(**BATCH, adapter_names=NAMES).logits
    for row, alone in zip(mixed, expected):
        torch.testing.assert_close(row[2:], alone[2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_keeps_every_instances_adapter(two, options):
    options = {**BATCH, **options, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def run(model, **names):
        tokens = model.generate(**options, **names)
        return tokens.view(len(NAMES), -1, tokens.shape[-1])

    expected = one_by_one(two, run)
    assert torch.equal(run(two, adapter_names=NAMES), torch.stack(expected))


@pytest.mark.parametrize(
    "names, message",
    [
        (["default"] * 3, "Length of `adapter_names` should be the same .* got 3 and 4"),
        (["default", "third", "fourth", "default"], r"non-existing adapter\(s\): fourth, third"),
    ],
)
def test_names_that_do_not_fit_the_batch_are_one_clear_error(two, names, message):
    own = logits(two)
    with pytest.raises(MixLoraError, match=message) as error:
        two(**BATCH, adapter_names=names)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(two), own)


def test_names_are_refused_in_training(two):
    with pytest.raises(MixLoraError, match="training mode"):
        two.train()(**BATCH, adapter_names=NAMES)


def test_disabling_adapters_goes_before_naming_them(two):
    with two.disable_adapter():
        assert torch.equal(two(**BATCH, adapter_names=NAMES).logits, two(**BATCH).logits)


def test_names_of_one_thread_do_not_reach_another(two):
    expected = logits(two)
    with two.base_model._enable_peft_forward_hooks(adapter_names=NAMES), ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(logits, two).result(), expected)


# --- what is adapted


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"target_modules": "all-linear"}, LINEAR_LAYERS),
        ({"target_modules": r".*layers\.1\..*\.(q|v)_proj"}, 2),
        ({"target_modules": ["q_proj", "down_proj"]}, 4),
        ({"exclude_modules": ["q_proj"]}, 12),
        ({"exclude_modules": r".*\.mlp\..*"}, 8),
        ({"layers_to_transform": [1]}, 7),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, 7),
        ({}, LINEAR_LAYERS),
    ],
)
def test_configuration_decides_which_layers_are_adapted(llama, options, expected):
    assert len(layers(get_peft_model(llama, config(**options)))) == expected


@newer_peft
def test_second_adapter_takes_all_linear_layers_too(llama):
    model = get_peft_model(llama, config(target_modules="all-linear"))
    model.add_adapter("second", config(target_modules="all-linear"))
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules
    assert len(layers(model)) == LINEAR_LAYERS
    assert all(set(layer.r) == {"default", "second"} for layer in layers(model).values())


def test_language_models_head_is_adapted_only_by_name(llama):
    assert list(layers(get_peft_model(llama, config(target_modules=["lm_head"])))) == ["base_model.model.lm_head"]


def test_patterns_change_rank_and_alpha_of_the_layers_they_name(llama, reload, tmp_path):
    model = adapt(llama, rank_pattern={"q_proj": 4, r".*layers\.1\..*v_proj": 1}, alpha_pattern={"down_proj": 40})
    for name, layer in layers(model).items():
        r = 4 if "q_proj" in name else 1 if "layers.1" in name and "v_proj" in name else 2
        alpha = 40 if "down_proj" in name else 8
        assert layer.r["default"] == r and layer.scaling["default"] == alpha / r
        assert layer.mixlora_cfs["default"].shape[0] == r
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(model))
    assert all(
        route.index_A.shape == (2, layers(model)["base_model.model." + name].r["default"])
        for name, route in model.base_model.routes().items()
    )


@pytest.mark.parametrize(
    "options", [{"target_modules": ["no_such_proj"]}, {"exclude_modules": ".*"}, {"layers_to_transform": [9]}], ids=str
)
def test_target_that_matches_nothing_is_one_clear_error(llama, options):
    with pytest.raises(MixLoraError, match="adapter 'default' does not fit LlamaForCausalLM: "):
        get_peft_model(llama, config(**{"target_modules": ["q_proj"], **options}))


def test_target_that_is_not_linear_is_one_clear_error(llama):
    with pytest.raises(MixLoraError, match="cannot adapt LlamaRMSNorm"):
        get_peft_model(llama, config(target_modules=["input_layernorm"]))


def test_model_of_unknown_kind_needs_target_modules():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), paper_form())


def test_model_that_was_entered_for_lora_is_known(monkeypatch):
    monkeypatch.setitem(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "new_model", ["inner"])
    base = Biased()
    base.config = {"model_type": "new_model"}
    assert list(layers(get_peft_model(base, paper_form()))) == ["base_model.model.inner"]


def test_modules_to_save_are_trained_and_saved(llama, reload, tmp_path):
    model = adapt(llama, modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    assert head.modules_to_save["default"].weight.requires_grad
    head.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == LINEAR_LAYERS * 7 + 1
    assert torch.equal(logits(reload(tmp_path)), logits(model))


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.outer(self.inner(x))


@pytest.mark.parametrize("bias, trained", [("none", []), ("mixlora_only", ["inner"]), ("all", ["inner", "outer"])])
def test_bias_option_decides_which_biases_train_and_are_saved(tmp_path, bias, trained):
    base = Biased()
    state = copy.deepcopy(base.state_dict())
    model = randomise(get_peft_model(base, paper_form(r=2, target_modules=["inner"], bias=bias)))
    biases = [n for n, p in model.named_parameters() if "bias" in n and p.requires_grad]
    assert [name.split(".")[2] for name in biases] == trained
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    model.save_pretrained(tmp_path)
    fresh = Biased()
    fresh.load_state_dict(state)
    x = torch.randn(2, 3, 8)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(x), model(x))


# --- functions of PEFT beside get_peft_model


def test_state_dict_travels_between_models(_llama, llama, copy_of):
    model, other = adapt(llama), get_peft_model(copy_of(_llama), config()).eval()
    state = get_peft_model_state_dict(model)
    assert len(state) == LINEAR_LAYERS * 7
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("with_statistics", [True, False])
def test_adapter_is_loaded_without_memory_for_initial_weights(llama, _llama, copy_of, with_statistics):
    model = adapt(copy_of(_llama))
    state = get_peft_model_state_dict(model)
    if not with_statistics:
        state = {name: tensor for name, tensor in state.items() if "mixlora_stats" not in name}
    bare = inject_adapter_in_model(config(), llama, low_cpu_mem_usage=True)
    assert {p.device.type for n, p in bare.named_parameters() if "mixlora_" in n} == {"meta"}
    set_peft_model_state_dict(bare, state, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in bare.state_dict().values())
    assert torch.equal(logits(bare.eval()), logits(model))


@newer_peft
def test_layers_are_injected_where_a_state_dict_has_them(llama, _llama, copy_of):
    model = inject_adapter_in_model(config(target_modules=["q_proj", "down_proj"]), copy_of(_llama))
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        injected = inject_adapter_in_model(config(), llama, state_dict=get_peft_model_state_dict(model))
    assert len(layers(injected)) == 4 and set(layers(injected)) == set(layers(model))


def test_adapter_is_injected_into_a_bare_model(_llama, llama, copy_of):
    injected = randomise(inject_adapter_in_model(config(), llama)).eval()
    assert type(injected) is LlamaForCausalLM
    assert torch.equal(logits(injected), logits(adapt(copy_of(_llama))))


def test_transformers_own_adapter_interface(_llama, llama, copy_of, tmp_path):
    model = adapt(copy_of(_llama))
    model.save_pretrained(tmp_path)
    llama.load_adapter(str(tmp_path))
    assert torch.equal(logits(llama), logits(model))


def test_transformers_own_adapter_interface_takes_whole_adapters_only(_llama, llama, copy_of, tmp_path):
    model = randomise(get_peft_model(copy_of(_llama), MixLoraConfig(r=2, num_factors=6, task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    lost = "base_model.model.model.layers.0.self_attn.v_proj.mixlora_B"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file)
    assert "lacks model.layers.0.self_attn.v_proj.mixlora_B" in message_of(llama.load_adapter, tmp_path)


@pytest.mark.parametrize("read", [False, True], ids=["from a folder", "as tensors"])
def test_transformers_own_adapter_interface_keeps_what_was_counted(_llama, llama, copy_of, tmp_path, read):
    """Sums of word vectors decide routes, and static updates are made of the layers' sums."""
    model = randomise(get_peft_model(copy_of(_llama), MixLoraConfig(r=2, num_factors=6, task_type="CAUSAL_LM")))
    ids = random_ids(4, 8)
    model.train()(input_ids=ids, labels=torch.where(torch.arange(8) < 4, -100, ids))
    model.eval().save_pretrained(tmp_path)
    if read:
        config = PeftConfig.from_pretrained(tmp_path)
        state = {name.removeprefix("base_model.model."): tensor for name, tensor in load_peft_weights(tmp_path).items()}
        llama.load_adapter(peft_config=config, adapter_state_dict=state)
    else:
        llama.load_adapter(str(tmp_path))
    assert torch.equal(logits(llama), logits(model))
    expected, found = get_peft_model_state_dict(model), get_peft_model_state_dict(llama)
    assert all(torch.equal(tensor, expected[f"base_model.model.{name}"]) for name, tensor in found.items())
    assert len(found) == len(expected) and sum("mixlora_stats" in name for name in found) == 2 * LINEAR_LAYERS + 1


def test_auto_model_finds_base_and_adapter(llama_folder, tmp_path):
    model = adapt(LlamaForCausalLM.from_pretrained(llama_folder).eval())
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.peft_config["default"].peft_type == "MIXLORA"
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_status_reports_the_adapter(llama):
    status = get_model_status(adapt(llama))
    assert status.peft_types == {"default": "MIXLORA"} and status.adapter_model_type == "MixLoraModel"
    assert status.num_adapter_layers == LINEAR_LAYERS and status.enabled is True and status.merged_adapters == []


def test_status_of_every_layer_tells_its_adapters(llama):
    model = adapt(llama, target_modules=["q_proj"])
    model.add_adapter("second", config(target_modules=["q_proj", "o_proj"]))
    status = {layer.name: layer for layer in get_layer_status(model)}
    assert len(status) == 4
    for name, layer in status.items():
        both = name.endswith("q_proj")
        assert layer.module_type == "mixlora.MixLoraLinear" and layer.enabled and layer.merged_adapters == []
        assert layer.available_adapters == (["default", "second"] if both else ["second"])
        assert layer.active_adapters == ["default"]
        assert layer.requires_grad == ({"default": True, "second": False} if both else {"second": False})
        assert set(layer.devices) == set(layer.available_adapters)


def test_deepcopy_is_independent(llama):
    model = adapt(llama)
    expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    randomise(other, seed=8)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(other), expected)
    assert all(
        a.last_routes["default"].index_A is not b.last_routes["default"].index_A
        for a, b in zip(layers(model).values(), layers(other).values())
    )


def test_pickle_keeps_the_model(llama):
    model = adapt(llama)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_model_that_has_trained_with_checkpointing_can_be_copied_and_pickled(llama):
    model = adapt(llama).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model(input_ids=IDS, labels=IDS).loss.backward()
    copied = copy.deepcopy(model)
    copied(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.equal(logits(copied.eval()), logits(model.eval()))


def test_repr_names_the_layer_and_its_adapters(llama):
    text = repr(adapt(llama, target_modules=["q_proj"]))
    assert "mixlora.MixLoraLinear(" in text and "mixlora_router_A" in text and "base_layer" in text


def test_routes_tell_what_every_layer_chose(llama):
    model = adapt(llama)
    assert model.base_model.routes() == {}
    logits(model)
    routes = model.base_model.routes()
    assert set(routes) == {name.removeprefix("base_model.model.") for name in layers(model)}
    for route in routes.values():
        assert route.index_A.shape == route.index_B.shape == (2, 2) and route.score_A.shape == (2, 6)
        assert (route.score_A.gather(1, route.index_A).diff() <= 0).all()
        assert not route.score_A.requires_grad
    assert model.base_model.routes("another") == {}


def test_model_moves_between_dtypes(llama):
    of_the_base = logits(copy.deepcopy(llama).to(torch.bfloat16)).dtype
    model = adapt(llama)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == of_the_base


def test_rank_above_the_pool_is_refused_before_any_layer_changes(llama):
    with pytest.raises(MixLoraError, match="rank_pattern"):
        get_peft_model(llama, config(rank_pattern={"q_proj": 7}))
    assert not any(isinstance(module, MixLoraLayer) for module in llama.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_routers_are_frozen_on_a_base_of_any_precision(llama, dtype):
    model = get_peft_model(llama.to(dtype), config(router_gradient="none"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("mixlora_A" in name or "mixlora_B" in name for name in trained)


def test_adapter_loaded_for_inference_trains_on_no_precision(llama, tmp_path):
    get_peft_model(copy.deepcopy(llama), config()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.to(torch.bfloat16), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("place", ["peft", "peft.utils", "peft.utils.save_and_load", "peft.peft_model"])
def test_state_dict_functions_know_the_type_wherever_they_are_imported_from(llama, _llama, copy_of, place):
    module = importlib.import_module(place)
    model, other = adapt(llama), get_peft_model(copy_of(_llama), config()).eval()
    module.set_peft_model_state_dict(other, module.get_peft_model_state_dict(model))
    assert torch.equal(logits(other), logits(model))
