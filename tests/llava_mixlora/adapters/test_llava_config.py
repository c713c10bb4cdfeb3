"""The `config.json` of an adapter is data: nothing in it chooses code, kernels or sizes that no model has."""

import json

import pytest

from llava_mixlora.adapters.llava_config import check_names_no_code, llava_config, projector_shapes, read_llava_config

from ...tiny import message_of


@pytest.fixture
def folder(llava_folder, patched, tmp_path):
    """A folder with nothing but the `config.json` of a LLaVA."""
    (tmp_path / "config.json").write_text((llava_folder / "config.json").read_text())
    return tmp_path


def change(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_configuration_is_that_of_transformers(folder, llava_folder):
    from transformers import AutoConfig

    expected, found = AutoConfig.from_pretrained(llava_folder), llava_config(folder)
    assert type(found) is type(expected)
    written, wanted = ({k: v for k, v in each.to_dict().items() if k != "_name_or_path"} for each in (found, expected))
    assert written == wanted and found.mm_projector_type == "mlp2x_gelu"


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation_internal": "owner/kernel"},
        {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "owner/name--code.Model"}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"to_dict": "x", "__class__": "x", "save_pretrained": 1},
        {"use_kernels": True, "custom_generate": "owner/name"},
    ],
)
def test_fields_that_select_code_do_not_reach_transformers(folder, fields):
    change(folder, **fields)
    config = llava_config(folder)
    assert (
        config._attn_implementation in (None, "eager") and callable(config.to_dict) and callable(config.save_pretrained)
    )
    for name in ("auto_map", "quantization_config", "use_kernels", "custom_generate"):
        assert getattr(config, name, None) is None


@pytest.mark.parametrize("kind", ["unknown", "bert", "llava_mpt", "clip", None, 3, ["llava_llama"]])
def test_other_model_types_are_refused_whatever_code_they_name(folder, kind):
    change(folder, model_type=kind, auto_map={"AutoConfig": "code.Config"})
    said = message_of(llava_config, folder)
    assert f"model_type={kind!r}" in said and "expected an adapter of a Llama (llava_llama)" in said


def test_fields_of_forks_pass_and_strange_ones_are_told(folder, capsys):
    change(folder, mm_tunable_parts="x", image_grid_pinpoints=[[1, 2]], surprise=1)
    config = llava_config(folder)
    assert config.image_grid_pinpoints == [[1, 2]] and not hasattr(config, "surprise")
    assert "does not know: surprise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2'"),
        ({"hidden_size": 2.5}, "hidden_size=2.5"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"vocab_size": [1]}, "vocab_size=[1]"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings=1000000000000"),
        ({"mm_projector_type": "mlp1000000000x_gelu"}, "mm_projector_type='mlp1000000000x_gelu'"),
        ({"mm_projector_type": 2}, "mm_projector_type=2"),
        ({"mm_vision_tower": {"a": 1}}, "mm_vision_tower={'a': 1}"),
        ({"torch_dtype": "load"}, "torch_dtype='load'"),
        ({"some_number": 1e30}, "some_number=1e+30"),
        ({"mm_word": "x" * 10**5}, "mm_word has 100,000 letters"),
    ],
)
def test_values_that_no_model_has_are_named(folder, fields, named):
    change(folder, **fields)
    said = message_of(read_llava_config, folder)
    assert named in said and str(folder / "config.json") in said


def test_what_transformers_cannot_use_is_one_line(folder):
    change(folder, rope_parameters={"rope_type": 3}, rope_scaling={"type": [1], "factor": "x"})
    try:
        llava_config(folder)
    except ValueError as error:
        assert "\n" not in str(error) and "does not describe a" in str(error)


@pytest.mark.parametrize("value", ["owner/kernel", {"": "owner/kernel"}])
@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_whole_model_that_names_a_kernel_is_refused(folder, name, value):
    check_names_no_code(str(folder))
    change(folder, **{name: value})
    assert f"says {name}=" in message_of(check_names_no_code, str(folder))


def test_projector_has_the_shapes_that_llava_gives_it(llava):
    named = {name: tuple(each.shape) for name, each in llava.get_model().mm_projector.named_parameters()}
    assert projector_shapes(llava.config.to_dict()) == named
    assert projector_shapes({"hidden_size": 3, "mm_hidden_size": 2, "use_mm_proj": True}) == {
        "weight": (3, 2),
        "bias": (3,),
    }
    assert (
        projector_shapes({"hidden_size": 3}) == {}
        and projector_shapes({"use_mm_proj": True, "mm_projector_type": "ldp"}) is None
    )
