"""Models of which accelerate keeps some layers on disk, or on the CPU, while they do not run."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from ...tiny import layers, newer_peft, paper_form, random_ids, randomise

IDS = random_ids(2, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
STEP = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.where(torch.arange(7) < 5, -100, IDS)}
PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
ONE_LAYER = {**dict.fromkeys(PARTS, "cpu"), "model.layers.0": "cpu", "model.layers.1": "disk"}
ALL_LAYERS = {**ONE_LAYER, "model.layers.0": "disk"}


def config(**options):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    return paper_form(**options)


def offloaded(folder, device_map, place):
    model = LlamaForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=str(place / "base"))
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    return model


def load(folder, adapter, device_map, place, **options):
    """The base and its adapter as PEFT's tests of LoRA load them."""
    wrapped = {f"base_model.model.{name}": device for name, device in device_map.items()}
    base = offloaded(folder, device_map, place)
    return PeftModel.from_pretrained(base, adapter, device_map=wrapped, offload_folder=str(place / "all"), **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def generated(model):
    return model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=5, min_new_tokens=5, do_sample=False)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes what it puts on disk below the working directory


@pytest.fixture
def trained(llama):
    """A model in memory whose adapter has an effect, and statistics to merge it by."""
    model = randomise(get_peft_model(llama, config()))
    model.train()(**STEP)
    return model.eval()


@pytest.fixture
def adapter(trained, tmp_path):
    trained.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@newer_peft  # PEFT 0.13 looks for LoRA's base weights under a wrong name too
@pytest.mark.parametrize("device_map", [ONE_LAYER, ALL_LAYERS], ids=["one layer", "all layers"])
def test_offloaded_model_computes_what_it_does_in_memory(llama_folder, trained, adapter, tmp_path, device_map):
    model = load(llama_folder, adapter, device_map, tmp_path)
    assert layers(model)["base_model.model.model.layers.1.mlp.up_proj"].base_layer.weight.is_meta
    assert torch.equal(logits(model), logits(trained))
    assert torch.equal(generated(model), generated(trained))
    with model.disable_adapter(), trained.disable_adapter():
        assert torch.equal(logits(model), logits(trained))


@newer_peft
def test_adapter_is_saved_before_its_offloaded_base_has_run(llama_folder, trained, adapter, tmp_path):
    load(llama_folder, adapter, ALL_LAYERS, tmp_path).save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_folder), tmp_path / "again")
    assert torch.equal(logits(again), logits(trained))
    assert torch.equal(logits(again.merge_and_unload()), logits(trained.merge_and_unload()))


@newer_peft
def test_adapter_of_an_offloaded_base_merges(llama_folder, trained, adapter, tmp_path):
    model, own = load(llama_folder, adapter, ONE_LAYER, tmp_path), logits(trained)
    trained.merge_adapter()
    model.merge_adapter()
    assert torch.equal(logits(model), logits(trained))
    model.unmerge_adapter()
    assert torch.equal(logits(model), own)
    assert torch.equal(logits(model.merge_and_unload()), logits(trained))


@newer_peft
def test_adapter_of_an_offloaded_base_trains(llama_folder, trained, adapter, tmp_path):
    model = load(llama_folder, adapter, ALL_LAYERS, tmp_path, is_trainable=True)
    for each in (model, trained):
        each.train()(**STEP).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 2 * 7 * 5
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad)


def test_new_adapter_of_an_offloaded_base_has_values(llama_folder, trained, tmp_path):
    model = get_peft_model(offloaded(llama_folder, ALL_LAYERS, tmp_path), config(init_weights=False))
    assert {p.device.type for n, p in model.named_parameters() if "mixlora_" in n} == {"cpu"}
    assert torch.equal(logits(randomise(model).eval()), logits(trained))


@newer_peft
def test_second_adapter_is_loaded_beside_an_offloaded_base(llama_folder, trained, adapter, tmp_path):
    model = load(llama_folder, adapter, ALL_LAYERS, tmp_path)
    model.add_adapter("new", config(init_weights=False))
    model.load_adapter(str(adapter), "loaded")
    assert torch.equal(logits(model), logits(trained))
    model.set_adapter("new")
    assert logits(model).isfinite().all() and not torch.allclose(logits(model), logits(trained))
    model.set_adapter("loaded")
    assert torch.equal(logits(model), logits(trained))


@pytest.mark.parametrize("offload_buffers", [False, pytest.param(True, marks=newer_peft)])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_adapted_model_can_be_offloaded(trained, tmp_path, where, offload_buffers):
    expected, tokens, moments = logits(trained), generated(trained), {}
    for name, layer in layers(trained).items():
        moments[name] = layer.mixlora_stats_moments["default"].clone()
    if where == "cpu":
        cpu_offload(trained, torch.device("cpu"), offload_buffers=offload_buffers)
    else:
        disk_offload(trained, str(tmp_path / "all"), torch.device("cpu"), offload_buffers=offload_buffers)
    assert all(parameter.is_meta for parameter in trained.parameters())
    with torch.inference_mode():
        assert torch.equal(trained(input_ids=IDS, attention_mask=MASK).logits, expected)
    assert torch.equal(generated(trained), tokens)
    for name, layer in layers(trained).items():
        assert layer.base_layer.weight.is_meta and not layer.mixlora_A["default"].is_inference()
        assert torch.equal(layer.mixlora_stats_moments["default"], moments[name])


def test_adapted_model_that_was_offloaded_merges(trained, copy_of):
    offloaded = copy_of(trained)
    cpu_offload(offloaded, torch.device("cpu"))
    assert torch.equal(logits(offloaded.merge_and_unload()), logits(trained.merge_and_unload()))


def test_model_on_no_device_gets_an_adapter_there(llama):
    model = get_peft_model(llama.to("meta"), config())
    assert all(parameter.is_meta for parameter in model.parameters())
