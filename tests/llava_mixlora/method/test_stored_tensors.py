"""An adapter's tensors are those of its configuration, or it is refused: by PEFT's own `from_pretrained` too."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.method.stored_tensors import allowing_incomplete

from ...tiny import message_of, paper_form, randomise

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved(copy_of, _llama, tmp_path):
    """An adapter with both routers and W_AB."""
    config = paper_form(r=2, num_factors=6, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    randomise(get_peft_model(copy_of(_llama), config)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def saved_with_words(copy_of, _llama, tmp_path):
    randomise(get_peft_model(copy_of(_llama), MixLoraConfig(r=2, num_factors=6))).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **tensors):
    """Replace tensors of the adapter, or take those away that are None."""
    stored = {**load_file(folder / WEIGHTS), **tensors}
    save_file({name: each for name, each in stored.items() if each is not None}, folder / WEIGHTS)


def configure(folder, **fields):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def said_of(folder, model):
    return message_of(PeftModel.from_pretrained, model, str(folder))


def test_whole_adapter_loads(saved, llama):
    assert PeftModel.from_pretrained(llama, saved).peft_config["default"].num_factors == 6


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.mixlora_router_A": None}, "lacks model.layers.0.self_attn.q_proj.mixlora_router_A (1 of 28 tensors)"),
        ({f"{Q}.mixlora_B": None}, "lacks model.layers.0.self_attn.q_proj.mixlora_B"),
        ({f"{Q}.mixlora_A": torch.zeros(5, 32)}, "q_proj.mixlora_A has the shape [5, 32], expected [6, "),
        ({f"{Q}.mixlora_A": torch.zeros(6, 32, dtype=torch.int8)}, "mixlora_A is stored as I8"),
        ({f"{Q}.mixlora_A": torch.zeros(6 * 32)}, "has the shape [192]"),
        ({f"{Q}.mixlora_cfs": torch.zeros(3, 6, 32)}, "mixlora_cfs has the shape [3, 6, 32], expected [2, 6, 32]"),
        ({f"{Q}.mixlora_router_B": torch.zeros(6, 31)}, "mixlora_router_B has the shape [6, 31]"),
        ({f"{Q}.mixlora_stats_usage": torch.zeros(2, 5, dtype=torch.int64)}, "mixlora_stats_usage has the shape"),
        ({f"{Q}.mixlora_stats_moments": torch.zeros(4, 6, 6)}, "mixlora_stats_moments is stored as F32"),
        ({f"{Q}.mixlora_new": torch.zeros(1)}, "holds model.layers.0.self_attn.q_proj.mixlora_new (1 of 29 tensors)"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_layer_is_made(saved, llama, monkeypatch, tensors, words):
    change(saved, **tensors)
    monkeypatch.setattr("llava_mixlora.method.model.MixLoraModel._create_and_replace", lambda *_, **__: pytest.fail())
    assert words in said_of(saved, llama)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.q_proj.base_layer.weight", "x.weight"])
def test_weight_of_the_base_is_refused(saved, llama, name):
    change(saved, **{f"base_model.model.{name}": torch.zeros(320 if name == "lm_head.weight" else 32, 32)})
    assert f"holds {name} (1 of 29 tensors)" in said_of(saved, llama)


def test_adapter_without_tensors_is_none(saved, llama):
    save_file({}, saved / WEIGHTS)
    assert "holds no tensors of a MIXLORA adapter" in said_of(saved, llama)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"routing": "random"}, "mixlora_router_A"),
        ({"routing": "ifs"}, "mixlora_cfs"),
        ({"pairing": "same", "routing": "ifs"}, "mixlora_router_B"),
        ({"num_factors": 4096}, "expected [4096, "),
        ({"num_factors": 10**7}, "num_factors=10000000: expected 4096 at most"),
        ({"r": 3}, "expected [3, 6, 48] (num_factors=6, r=3)"),
        ({"cfs": "table"}, "expected [2, 6, 6]"),
        ({"router_input": "words", "router_scope": "prompt"}, "mixlora_stats_words"),
        ({"target_modules": "(.*)*x"}, "matching a name could take minutes"),
        ({"rank_pattern": {"(a+)+": 2}}, "matching a name could take minutes"),
    ],
)
def test_configuration_of_another_adapter_is_refused(saved, llama, fields, words):
    configure(saved, **fields)
    assert words in said_of(saved, llama)


@pytest.mark.parametrize(("part", "value"), [("A", float("nan")), ("B", float("inf")), ("router_A", -float("inf"))])
def test_numbers_that_are_none_are_refused(saved, llama, part, value):
    tensor = load_file(saved / WEIGHTS)[f"{Q}.mixlora_{part}"]
    tensor[0, 0] = value
    change(saved, **{f"{Q}.mixlora_{part}": tensor})
    assert f"q_proj.mixlora_{part} (1 tensors) are not finite" in said_of(saved, llama)


def test_layer_that_the_model_has_and_the_adapter_has_not_is_missing(saved, llama):
    change(saved, **{name: None for name in load_file(saved / WEIGHTS) if name.startswith(Q)})
    said = said_of(saved, llama)
    assert "lacks" in said and "(5 of " in said and "--allow-incomplete" in said


def test_layer_that_the_model_has_not_is_unknown(saved, llama):
    stored = load_file(saved / WEIGHTS)
    change(saved, **{name.replace("layers.0", "layers.7"): each.clone() for name, each in stored.items()})
    assert "layers.7" in said_of(saved, llama)


def test_missing_tensors_can_be_meant(saved, llama):
    change(saved, **{f"{Q}.mixlora_router_A": None})
    with allowing_incomplete():
        model = PeftModel.from_pretrained(llama, str(saved))  # of which PEFT warns, but not the oldest
    loaded, stored = model.state_dict(), load_file(saved / WEIGHTS)
    assert torch.equal(loaded[f"{Q}.mixlora_A.default"], stored[f"{Q}.mixlora_A"])


def test_statistics_may_be_missing_but_not_the_centre_of_words(saved_with_words, llama):
    change(saved_with_words, **{n: None for n in load_file(saved_with_words / WEIGHTS) if "stats_" in n})
    assert "lacks mixlora_stats_words (1 of " in said_of(saved_with_words, llama)


def test_older_adapters_without_statistics_load(saved, llama):
    change(saved, **{name: None for name in load_file(saved / WEIGHTS) if "stats_" in name})
    PeftModel.from_pretrained(llama, str(saved))


def test_modules_and_biases_that_the_configuration_names_load(copy_of, _llama, tmp_path):
    config = paper_form(r=2, num_factors=6, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(copy_of(_llama), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(copy_of(_llama), str(tmp_path))


def test_embeddings_of_new_tokens_load_and_are_told(copy_of, _llama, tmp_path):
    model = get_peft_model(copy_of(_llama), paper_form(r=2, num_factors=6, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match="embeddings of its own"):
        PeftModel.from_pretrained(copy_of(_llama), str(tmp_path))
    change(tmp_path, **{"base_model.model.model.embed_tokens.weight": None})
    assert "holds lm_head.weight" in said_of(tmp_path, copy_of(_llama))


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": "MIXLORA", "lora_alpha": 8, "lora_alpha": 16}',
        '{"peft_type": "MIXLORA", "lora_alpha": NaN}',
    ],
)
def test_configuration_that_is_no_json_is_refused(saved, llama, text):
    (saved / CONFIG).write_text(text)
    assert "is damaged" in said_of(saved, llama)


def test_link_out_of_the_folder_is_not_followed(saved, llama, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / WEIGHTS
    (saved / WEIGHTS).rename(elsewhere)
    (saved / WEIGHTS).symlink_to(elsewhere)
    assert "outside of its folder" in said_of(saved, llama)


def test_adapter_in_the_cache_of_the_hub_loads(saved, llama, tmp_path_factory):
    repository = tmp_path_factory.mktemp("hub") / "models--owner--adapter"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "0123").mkdir(parents=True)
    for number, name in enumerate((WEIGHTS, CONFIG)):
        (saved / name).rename(repository / "blobs" / str(number))
        (repository / "snapshots" / "0123" / name).symlink_to(f"../../blobs/{number}")
    PeftModel.from_pretrained(llama, str(repository / "snapshots" / "0123"))


class OneLayer(nn.Module):
    """A model that is no transformer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)


def test_models_that_are_no_transformers_load_too(tmp_path):
    config = paper_form(r=1, num_factors=2, target_modules=["linear"])
    get_peft_model(OneLayer(), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(OneLayer(), str(tmp_path))
    with pytest.raises(MixLoraError, match=r"linear.mixlora_A has the shape \[2, 4\], expected \[2, 5\]"):
        wider = OneLayer()
        wider.linear = nn.Linear(5, 3)
        PeftModel.from_pretrained(wider, str(tmp_path))
