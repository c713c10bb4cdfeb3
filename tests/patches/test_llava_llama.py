"""Loading a quantized LLaVA: what is quantized, and what stays as it was."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from llava_mixlora.patches.llava_llama import _placed_with_little_memory, _with_the_last_token_alone
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from ..tiny import quantizes_on_cpu

BUILDER_4BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
ALL_4BIT = BitsAndBytesConfig(load_in_4bit=True)
TRAIN_4BIT = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["mm_projector"])


@pytest.fixture(scope="module")
def folder(_llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    _llava.save_pretrained(folder)
    return folder


@pytest.fixture
def load(patched, folder, caplog):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    caplog.set_level("ERROR", logger="transformers.modeling_utils")  # the checkpoint holds the vision tower twice

    def load(**how):
        return LlavaLlamaForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **how)

    return load


@quantizes_on_cpu
@pytest.mark.parametrize(
    "how, layer",
    [
        ({"load_in_8bit": True}, Linear8bitLt),
        ({"load_in_4bit": True, "quantization_config": BUILDER_4BIT}, Linear4bit),
    ],
)
def test_builders_flags_quantize_the_decoder_and_leave_the_rest_in_float16(load, how, layer):
    model = load(**how)
    assert isinstance(model.model.layers[0].mlp.up_proj, layer)
    assert type(model.lm_head) is torch.nn.Linear
    projector = [module for module in model.model.mm_projector if isinstance(module, torch.nn.Linear)]
    assert len(projector) == 2 and all(type(module) is torch.nn.Linear for module in projector)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float16}


@quantizes_on_cpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_trainings_flags_keep_their_dtype_and_the_projector(load, dtype, llama_folder):
    default = LlamaForCausalLM.from_pretrained(llama_folder, torch_dtype=None, quantization_config=ALL_4BIT)
    model = load(torch_dtype=dtype, quantization_config=TRAIN_4BIT, load_in_4bit=True, load_in_8bit=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)
    assert type(model.model.mm_projector[0]) is torch.nn.Linear
    assert model.model.norm.weight.dtype == (dtype or default.model.norm.weight.dtype)


@quantizes_on_cpu
def test_callers_configuration_is_left_as_it_was(load):
    load(quantization_config=TRAIN_4BIT)
    assert TRAIN_4BIT.llm_int8_skip_modules == ["mm_projector"]


def test_without_quantization_nothing_changes(load):
    model = load()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert model.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "given, passed",
    [
        (
            {"device_map": {"": "cpu"}, "low_cpu_mem_usage": False},
            {"device_map": {"": "cpu"}, "low_cpu_mem_usage": True},
        ),
        ({"low_cpu_mem_usage": False}, {"low_cpu_mem_usage": False}),
        ({"device_map": "auto"}, {"device_map": "auto"}),
    ],
)
def test_device_is_not_named_with_more_memory_than_it_allows(given, passed):
    class Model:
        @classmethod
        def from_pretrained(cls, **how):
            return how

    Model.from_pretrained = _placed_with_little_memory(Model.from_pretrained)
    assert Model.from_pretrained(**given) == passed


@pytest.mark.parametrize(
    "own_generate, cache, images, expected",
    [
        (False, ((1,),), "pixels", [[3]]),
        (False, ((1,),), None, [[1, 2, 3]]),
        (False, None, "pixels", [[1, 2, 3]]),
        (True, ((1,),), "pixels", [[1, 2, 3]]),
    ],
)
def test_prompt_is_not_given_anew_where_images_are_put_in_each_time(own_generate, cache, images, expected):
    class Model:
        def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
            return {"input_ids": input_ids, "position_ids": input_ids - 1, **kwargs}

    Model.__module__ = "llava.model"
    if own_generate:
        Model.generate = lambda self: None
    prepare = _with_the_last_token_alone(Model.prepare_inputs_for_generation)
    found = prepare(Model(), torch.tensor([[1, 2, 3]]), past_key_values=cache, images=images)
    assert found["input_ids"].tolist() == expected
    assert torch.equal(found["position_ids"], found["input_ids"] - 1)
