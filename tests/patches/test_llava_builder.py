"""Upstream's `load_pretrained_model` on what upstream's `train()` leaves behind."""

import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES, NOT_THE_LANGUAGE_MODEL
from llava_mixlora.adapters.model_choices import ModelChoices

from ..tiny import layers, message_of, paper_form, random_ids, randomise

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(llava_folder):
    return llava_folder


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Upstream's checkpoint holds the vision tower twice, and transformers reports that at length."""
    caplog.set_level("ERROR", logger="transformers.modeling_utils")


def write_adapter(base, folder, config):
    """What upstream's train() writes: the adapter, the configuration, the projector."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, config)  # its vision tower is not loaded yet, as in train()
    randomise(model)
    torch.manual_seed(7)
    projector = {
        f"base_model.model.{name}": torch.randn_like(parameter) * 0.3
        for name, parameter in model.base_model.model.named_parameters()
        if "mm_projector" in name
    }
    assert len(projector) == 4
    model.config.save_pretrained(folder)
    model.save_pretrained(folder)
    torch.save(projector, folder / NON_LORA_TRAINABLES)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava-tiny-mixlora")
    options = {"target_modules": NAMES, "exclude_modules": NOT_THE_LANGUAGE_MODEL, "task_type": "CAUSAL_LM"}
    write_adapter(base, folder, paper_form(r=2, num_factors=6, lora_alpha=8, **options))
    return folder


@pytest.fixture
def damaged(adapter, tmp_path):
    """A copy of the adapter to damage."""
    return shutil.copytree(adapter, tmp_path / "llava-mixlora")


@pytest.fixture
def load(patched):
    from llava.model import builder

    def load(path, model_base=None, name="llava-tiny-mixlora", **options):
        return builder.load_pretrained_model(str(path), model_base, name, device="cpu", **options)

    return load


def ask(model):
    ids = torch.tensor([[1, 5, -200, 7, 8, 9]])
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)).half()
    with torch.no_grad():
        return model(input_ids=ids, images=images).logits


def loaded_by_peft(base, adapter):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(base, torch_dtype=torch.float16)
    projector = torch.load(adapter / NON_LORA_TRAINABLES)
    model.load_state_dict({name.removeprefix("base_model.model."): p for name, p in projector.items()}, strict=False)
    model = PeftModel.from_pretrained(model, adapter)
    model.get_model().get_vision_tower().load_model()  # in float32, as upstream leaves it unless device_map is given
    return model.eval()


def test_adapter_stays_an_adapter_and_its_base_is_inferred(load, adapter, base):
    tokenizer, model, image_processor, context_length = load(adapter)
    assert model.peft_config["default"].peft_type == "MIXLORA"
    assert not model.training
    assert len(tokenizer) == model.config.vocab_size and context_length == 2048
    assert image_processor.crop_size["height"] == 16
    assert torch.equal(ask(model), ask(loaded_by_peft(base, adapter)))


def test_incomplete_adapter_is_loaded_where_that_is_chosen(load, damaged):
    weights = load_file(damaged / "adapter_model.safetensors")
    del weights[next(name for name in weights if name.endswith("mixlora_A"))]
    save_file(weights, damaged / "adapter_model.safetensors")
    assert "lacks" in message_of(load, damaged)
    assert load(damaged, choices=ModelChoices(allow_incomplete=True))[1].peft_config


def test_adapter_and_projector_have_an_effect(load, adapter, base, damaged):
    _, model, _, _ = load(adapter)
    with_both = ask(model)
    with model.disable_adapter():
        assert not torch.allclose(ask(model), with_both, atol=1e-2)
    (damaged / NON_LORA_TRAINABLES).unlink()
    _, without_projector, _, _ = load(damaged)
    assert not torch.allclose(ask(without_projector), with_both, atol=1e-2)


def test_only_the_trained_layers_are_adapted(load, adapter):
    """The tower's attention has projections of the same names, and is loaded here, not in training."""
    _, model, _, _ = load(adapter)
    assert len(layers(model)) == 14
    assert not any("vision_tower" in name for name in layers(model))


@pytest.mark.parametrize("which", ["adapter", "whole model"])
def test_loaded_model_answers_a_batch_as_it_answers_each_prompt_alone(load, adapter, base, which):
    _, model, _, _ = load(adapter) if which == "adapter" else load(base, name="llava")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)).half()
    short, long = torch.tensor([[1, -200, 7]]), torch.tensor([[1, 5, -200, 7, 8, 9, 10]])
    batch = torch.cat([torch.cat([short, torch.zeros(1, 4, dtype=torch.long)], 1), long])  # padded on the right

    def generate(ids, images, mask):
        return model.generate(ids, images=images, attention_mask=mask, do_sample=False, max_new_tokens=4, min_length=4)

    together = generate(batch, images, batch != 0)
    for row, ids in enumerate((short, long)):
        assert torch.equal(together[row], generate(ids, images[row : row + 1], ids != 0)[0])


def test_given_base_wins_over_the_recorded_one(load, damaged, base):
    config = (damaged / "adapter_config.json").read_text()
    (damaged / "adapter_config.json").write_text(config.replace(str(base), "/no/such/base"))
    _, model, _, _ = load(damaged, str(base))
    assert layers(model)


def test_loaded_model_generates(load, adapter):
    _, model, _, _ = load(adapter)
    ids = torch.tensor([[1, 5, -200, 7, 8, 9]])
    options = {"images": torch.randn(1, 3, 16, 16).half(), "do_sample": False, "max_new_tokens": 5}
    answer = model.generate(ids, eos_token_id=None, pad_token_id=0, **options)
    uncached = model.generate(ids, eos_token_id=None, pad_token_id=0, use_cache=False, **options)
    assert answer.shape[1] >= 5 and torch.equal(answer, uncached)  # transformers 4.37 adds one


def test_folder_needs_no_lora_in_its_name(load, adapter):
    _, model, _, _ = load(adapter, name="checkpoint-final")
    assert model.peft_config["default"].peft_type == "MIXLORA"


def test_adapter_of_a_newer_version_is_refused(load, damaged):
    config = (damaged / "adapter_config.json").read_text()
    (damaged / "adapter_config.json").write_text(config.replace('"format_version": 1', '"format_version": 3'))
    assert "saved by a newer llava-mixlora" in message_of(load, damaged)


def test_missing_base_is_named(load, damaged, base):
    config = (damaged / "adapter_config.json").read_text()
    (damaged / "adapter_config.json").write_text(config.replace(str(base), "/no/such/base"))
    message = message_of(load, damaged)
    assert "/no/such/base: no such folder" in message and "--model-base" in message


def test_given_base_that_does_not_exist_is_named(load, damaged):
    assert "--model-base /no/such/base: no such folder" in message_of(load, damaged, "/no/such/base")


def test_adapter_that_names_no_base_asks_for_one(load, damaged, base):
    config = (damaged / "adapter_config.json").read_text()
    (damaged / "adapter_config.json").write_text(config.replace(f'"{base}"', "null"))
    assert "pass --model-base" in message_of(load, damaged)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000])
def test_truncated_adapter_is_named(load, damaged, kept):
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "adapter_model.safetensors is damaged" in message_of(load, damaged)


def test_missing_adapter_weights_are_named(load, damaged):
    (damaged / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in message_of(load, damaged)


def test_damaged_projector_is_named(load, damaged):
    (damaged / NON_LORA_TRAINABLES).write_bytes(b"PK\x03\x04 nothing")
    assert f"{NON_LORA_TRAINABLES} is damaged" in message_of(load, damaged)


def test_plain_lora_folder_is_merged_by_upstream(load, base, tmp_path):
    folder = tmp_path / "llava-lora"
    write_adapter(base, folder, LoraConfig(r=2, target_modules=NAMES, task_type="CAUSAL_LM"))
    _, model, _, _ = load(folder, str(base), "llava-lora")
    assert not isinstance(model, PeftModel) and not layers(model)
    assert ask(model).isfinite().all()


def test_plain_lora_stays_an_adapter_where_that_is_asked_for(load, base, tmp_path):
    folder = tmp_path / "llava-lora"
    config = LoraConfig(r=2, target_modules=NAMES, task_type="CAUSAL_LM", init_lora_weights=False)
    write_adapter(base, folder, config)
    _, kept, _, _ = load(folder, str(base), "llava-lora", keep_adapter=True)
    _, merged, _, _ = load(folder, str(base), "llava-lora")
    assert isinstance(kept, PeftModel) and not kept.training
    assert torch.allclose(ask(kept), ask(merged), atol=0.05)  # in float16
    assert not any("vision_tower" in name and "lora_A" in name for name, _ in kept.named_parameters())


def test_plain_llava_is_loaded_by_upstream(load, base):
    _, model, _, _ = load(base, None, "llava-base")
    assert not isinstance(model, PeftModel)
    ids = random_ids(1, 4)
    assert model(input_ids=ids).logits.shape == (1, 4, model.config.vocab_size)


@pytest.mark.parametrize("name", ["finetuned", "llava-mpt-like", "not-mistral", "llava-lora-merged"])
def test_whole_model_loads_whatever_its_folder_is_called(load, base, tmp_path, name):
    folder = shutil.copytree(base, tmp_path / name)
    _, model, image_processor, _ = load(folder, None, name)
    assert type(model).__name__ == "LlavaLlamaForCausalLM" and image_processor is not None


def test_plain_lora_loads_whatever_its_folder_is_called(load, base, tmp_path):
    write_adapter(base, tmp_path / "out", LoraConfig(r=2, target_modules=NAMES, task_type="CAUSAL_LM"))
    _, model, image_processor, _ = load(tmp_path / "out", str(base), "out")
    assert not isinstance(model, PeftModel) and image_processor is not None


@pytest.mark.parametrize("asked", [{"use_flash_attn": True}, {"attn_implementation": "flash_attention_2"}])
def test_flash_attention_that_cannot_be_had_is_one_line_and_sdpa(load, adapter, capsys, asked):
    _, model, _, _ = load(adapter, **asked)
    assert model.config._attn_implementation == "sdpa" and layers(model)
    told = [line for line in capsys.readouterr().out.splitlines() if "flash-attn" in line]
    assert told == ["flash-attn does not run on cpu: using PyTorch's scaled dot product attention instead."]


def test_attention_is_transformers_choice_unless_asked_for(load, base, capsys):
    _, model, _, _ = load(base, name="llava", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert "flash-attn" not in capsys.readouterr().out
