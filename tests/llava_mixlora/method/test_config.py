"""The configuration: what it accepts, refuses, and writes."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftType

from llava_mixlora import MixLoraConfig, MixLoraError, __version__
from llava_mixlora.method.config import BIASES, CFS_PRODUCTS, DECODE_ROUTINGS, ROUTER_GRADIENTS, ROUTER_SCOPES, ROUTINGS


def test_defaults_are_the_documented_ones():
    config = MixLoraConfig()
    assert (config.r, config.num_factors, config.lora_alpha, config.lora_dropout) == (4, 16, 32, 0.0)
    assert (config.pairing, config.routing, config.router_gradient) == ("same", "ifs", "straight_through")
    assert (config.router_scope, config.router_input) == ("instruction", "words")
    assert (config.count_padding, config.decode_routing, config.format_version) == (False, "prefill", 2)
    assert config.bias == "none" and config.init_weights and config.peft_type == PeftType.MIXLORA


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"routing": "ifs_cfs"}, ("rank", "ifs_cfs", "instruction", "words")),
        ({"pairing": "rank"}, ("rank", "ifs_cfs", "instruction", "words")),
        ({"cfs": "table"}, ("rank", "ifs_cfs", "instruction", "words")),
        ({"cfs_temperature": 0.1}, ("rank", "ifs_cfs", "instruction", "words")),
        ({"cfs_product": "sums"}, ("rank", "ifs_cfs", "instruction", "words")),
        ({"routing": "ifs"}, ("same", "ifs", "instruction", "words")),
        ({"routing": "random"}, ("same", "random", "instruction", "hidden")),
        ({"decode_routing": "step"}, ("same", "ifs", "instruction", "hidden")),
        ({"count_padding": True}, ("same", "ifs", "prompt", "hidden")),
        ({"task_type": "SEQ_2_SEQ_LM"}, ("same", "ifs", "instruction", "hidden")),
        ({"router_scope": "sequence"}, ("same", "ifs", "sequence", "words")),
    ],
)
def test_what_is_left_open_goes_with_what_is_said(options, form):
    config = MixLoraConfig(**options)
    assert (config.pairing, config.routing, config.router_scope, config.router_input) == form


@pytest.mark.parametrize("routing", [None, "ifs", "ifs_cfs", "random"])
def test_stored_adapter_that_names_no_form_is_the_papers(tmp_path, routing):
    written = {"peft_type": "MIXLORA", "r": 2, "num_factors": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | ({"routing": routing} if routing else {})))
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.pairing, config.routing) == ("rank", routing or "ifs_cfs")
    assert (config.router_scope, config.router_input, config.format_version) == ("prompt", "hidden", 1)


def test_copy_keeps_the_form():
    for config in (MixLoraConfig(), MixLoraConfig.paper(), MixLoraConfig(routing="ifs_cfs", router_input="hidden")):
        assert MixLoraConfig(**config.to_dict()).to_dict() == config.to_dict()
        assert replace(config, r=2).pairing == config.pairing


def test_paper_preset_is_the_released_behaviour():
    config = MixLoraConfig.paper()
    assert (config.pairing, config.routing, config.router_input) == ("rank", "ifs_cfs", "hidden")
    assert (config.router_gradient, config.router_scope, config.decode_routing) == ("none", "sequence", "step")
    assert config.count_padding and config.cfs_product == "sums"


def test_paper_preset_takes_further_fields_and_other_values():
    config = MixLoraConfig.paper(r=2, num_factors=8, count_padding=False)
    assert (config.r, config.num_factors, config.count_padding) == (2, 8, False)
    assert (config.router_gradient, config.router_input) == ("none", "hidden")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 64),
    st.sampled_from(ROUTINGS),
    st.sampled_from(ROUTER_GRADIENTS),
    st.sampled_from(ROUTER_SCOPES),
    st.sampled_from(DECODE_ROUTINGS),
    st.sampled_from(CFS_PRODUCTS),
    st.sampled_from(BIASES),
    st.floats(0, 0.99),
    st.data(),
)
def test_every_documented_value_is_accepted(E, routing, gradient, scope, decode, product, bias, dropout, data):
    r = data.draw(st.integers(1, E))
    MixLoraConfig(
        r=r,
        num_factors=E,
        routing=routing,
        router_gradient=gradient,
        router_scope=scope,
        decode_routing=decode,
        cfs_product=product,
        bias=bias,
        lora_dropout=dropout,
        rank_pattern={"x": E},
    )


@pytest.mark.parametrize(
    "options, named",
    [
        ({"r": 17}, "r=17: expected 1 to num_factors=16"),
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": True}, "r=True"),
        ({"balance_loss_weight": 10**400}, "expected a number of at least 0"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"task_type": "a\nb"}, "expected one of SEQ_CLS"),
        ({"base_model_name_or_path": "a\0b"}, "expected a name"),
        ({"base_model_name_or_path": "x" * 300}, "expected a name"),
        ({"base_model_name_or_path": "\ud800"}, "expected a name"),
        ({"num_factors": 0}, "num_factors=0"),
        ({"num_factors": "8"}, "num_factors='8'"),
        ({"rank_pattern": {"q_proj": 17}}, "rank_pattern['q_proj']=17"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_dropout": float("nan")}, "lora_dropout=nan"),
        ({"routing": "best"}, "routing='best': expected one of 'ifs_cfs', 'ifs', 'random'"),
        ({"router_gradient": "yes"}, "router_gradient='yes'"),
        ({"router_scope": "all"}, "router_scope='all'"),
        ({"decode_routing": "token"}, "decode_routing='token'"),
        ({"balance_loss_weight": -0.1}, "balance_loss_weight=-0.1"),
        ({"balance_loss_weight": "0.1"}, "balance_loss_weight='0.1'"),
        ({"balance_loss_weight": float("nan")}, "balance_loss_weight=nan"),
        ({"balance_loss_weight": 0.1, "router_gradient": "none"}, "router_gradient='none' leaves none to train"),
        ({"balance_loss_weight": 0.1, "routing": "random"}, "routing='random' leaves none to train"),
        ({"format_version": 3}, "format_version=3"),
        ({"cfs_product": "outer"}, "cfs_product='outer'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"target_modules": "(q_proj"}, "target_modules='(q_proj'"),
        ({"exclude_modules": "*"}, "exclude_modules='*'"),
        ({"target_modules": "q.*", "layers_to_transform": [1]}, "layers_to_transform=[1]"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers'"),
    ],
)
def test_bad_value_is_named_in_one_line(options, named):
    with pytest.raises(MixLoraError) as error:
        MixLoraConfig(**options)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_adapter_of_a_newer_version_is_refused_with_both_versions(tmp_path):
    MixLoraConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    newer = {**json.loads(file.read_text()), "format_version": 7, "routing": "not invented yet", "new_field": 1}
    file.write_text(json.dumps(newer))
    with pytest.raises(MixLoraError) as error:
        PeftConfig.from_pretrained(str(tmp_path))
    message = str(error.value)
    assert "format_version=7" in message and f"llava-mixlora {__version__}" in message and "up to 2" in message
    assert "\n" not in message


def test_adapter_saved_before_formats_were_numbered_is_read(tmp_path):
    MixLoraConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    older = json.loads(file.read_text())
    del older["format_version"], older["balance_loss_weight"]
    file.write_text(json.dumps(older))
    assert PeftConfig.from_pretrained(str(tmp_path)).balance_loss_weight == 0


def test_every_field_carries_its_help():
    own = {field.name for field in fields(MixLoraConfig)} - {field.name for field in fields(PeftConfig)}
    assert own and all(field.metadata.get("help") for field in fields(MixLoraConfig) if field.name in own)


def test_lists_of_names_become_sets():
    config = MixLoraConfig(target_modules=["b", "a", "a"], exclude_modules=("c",))
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}


def test_saved_configuration_loads_as_itself(tmp_path):
    config = MixLoraConfig.paper(r=2, num_factors=8, target_modules=["q_proj"], alpha_pattern={"q_proj": 3.5})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MIXLORA"
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, MixLoraConfig)
    assert loaded.to_dict() == config.to_dict()
