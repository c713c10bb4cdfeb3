"""Names that lead a loader to a class, as its own text tells; stand-ins of the loaders that LLaVAs have."""

import pytest

from llava_mixlora.adapters.loader_branch import branch_of

pytestmark = pytest.mark.one_stack
AutoModelForCausalLM = LlavaLlamaForCausalLM = LlavaQwenForCausalLM = LlavaMistralForCausalLM = None


def of_llava(model_path, model_base, model_name, load_8bit=False, device="cuda", **kwargs):
    if "llava" in model_name.lower():
        if "lora" in model_name.lower() and model_base is not None:
            return LlavaLlamaForCausalLM.from_pretrained(model_base, config=model_path)
        if model_base is None:
            if "mistral" in model_name.lower():
                model = LlavaMistralForCausalLM.from_pretrained(model_path, low_cpu_mem_usage=True, **kwargs)
            else:
                model = LlavaLlamaForCausalLM.from_pretrained(model_path, low_cpu_mem_usage=True, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(model_path, **kwargs)
    return model


def with_its_own_config(model_path, model_base, model_name, customized_config=None, **kwargs):
    if "multimodal" in kwargs:
        several = True
    if "llava" in model_name.lower() or several:
        if "qwen" in model_name.lower() or "quyen" in model_name.lower():
            return LlavaQwenForCausalLM.from_pretrained(model_path, **kwargs)
        try:
            config = customized_config or model_path
            return LlavaLlamaForCausalLM.from_pretrained(model_path, config=config, **kwargs)
        except Exception:
            raise ValueError(f"Model {model_name} not supported") from None


def of_2023(model_path, model_base, model_name, load_8bit=False, device_map="auto"):
    kwargs = {"device_map": device_map}
    if "earthy" in model_name.lower():
        return LlavaLlamaForCausalLM.from_pretrained(model_path, **kwargs)


@pytest.mark.parametrize(
    "loader, language_model, name, takes_config",
    [
        (of_llava, "LlavaLlamaForCausalLM", "llava", True),
        (of_llava, "LlavaMistralForCausalLM", "llava-mistral", True),
        (with_its_own_config, "LlavaQwenForCausalLM", "llava-qwen", True),
        (with_its_own_config, "LlavaLlamaForCausalLM", "llava", False),
        (of_2023, "LlavaLlamaForCausalLM", "earthy", False),
    ],
)
def test_name_and_whether_a_configuration_reaches_the_class(loader, language_model, name, takes_config):
    branch = branch_of(loader, language_model)
    assert (branch.name, branch.takes_config) == (name, takes_config)


def test_class_that_a_loader_does_not_load_has_no_branch():
    assert branch_of(of_2023, "LlavaQwenForCausalLM") is None


@pytest.mark.parametrize("language_model, name", [("LlavaLlama", "llava"), ("LlavaMistral", "llava-mistral")])
def test_llavas_own_loader(patched, language_model, name):
    from llava.model.builder import load_pretrained_model

    branch = branch_of(load_pretrained_model, f"{language_model}ForCausalLM")
    assert (branch.name, branch.takes_config) == (name, True)
