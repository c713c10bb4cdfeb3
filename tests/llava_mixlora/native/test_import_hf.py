"""`import-hf`: an adapter of transformers' own LLaVA in upstream's, with the same logits."""

import json

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from llava_mixlora import MixLoraConfig
from llava_mixlora.adapters.adapter_folder import read_non_lora_trainables
from llava_mixlora.cli import main
from llava_mixlora.inference.loading import load_for_inference
from llava_mixlora.native.export import export_hf
from llava_mixlora.native.import_hf import import_hf

from ...tiny import message_of, plain, randomise, write_adapter
from ...two_llavas import Native, Upstream
from .conftest import QUESTIONS

WORDS = {"pairing": "same", "router_scope": "instruction", "router_input": "words", "routing": "ifs"}


@pytest.fixture
def native(llava_folder, tmp_path):
    export_hf(llava_folder, tmp_path / "native")
    return Native(tmp_path / "native")


def trained_on(native, folder, **options):
    """An adapter of transformers' LLaVA with an effect, whose base has another projector than before."""
    torch.manual_seed(0)
    for parameter in native.base.model.multi_modal_projector.parameters():
        parameter.data += 0.05
    native.base.save_pretrained(native.folder)
    config = MixLoraConfig(r=2, num_factors=4, task_type="CAUSAL_LM", **options)
    model = randomise(get_peft_model(native.base, config), scale=0.3)
    for parameter in (p for name, p in model.named_parameters() if "modules_to_save" in name):
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    native.model = model.eval()
    return folder


def assert_same(native, upstream, pictures):
    for picture in pictures:
        for question in QUESTIONS:
            expected = upstream.logits(picture, question)
            assert torch.allclose(native.logits(picture, question)[..., : expected.shape[-1]], expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_to_transform": [1]},
        {"target_modules": ["up_proj"], "rank_pattern": {"layers.1.mlp.up_proj": 1}},
        {"alpha_pattern": {"language_model.layers.1.mlp.up_proj": 40}},
        {"rank_pattern": {r".*language_model.*1\.mlp\.up_proj": 1}},
    ],
    ids=["all layers", "some layers", "some kinds", "by a shortened name", "by another expression"],
)
def test_logits_are_equal(options, native, llava_folder, pictures, tmp_path):
    adapter = trained_on(native, tmp_path / "adapter", **options)
    out = tmp_path / "upstream"
    words = ["--model-path", str(adapter), "--model-base", str(llava_folder), "--save-model-path", str(out)]
    assert main(["import-hf", *words]) == 0
    assert_same(native, Upstream(llava_folder, out), pictures)
    assert main(["inspect", str(out)]) == 0
    load_for_inference(out)  # by what it says of its base and tower


@pytest.mark.parametrize(
    "saved",
    [
        ["multi_modal_projector", "lm_head"],
        ["linear_1", "linear_2", "model.language_model.norm"],
        ["language_model.norm"],
    ],
    ids=", ".join,
)
def test_modules_that_it_saves_go_where_upstream_has_them(saved, native, llava_folder, pictures, tmp_path):
    adapter = trained_on(native, tmp_path / "adapter", modules_to_save=saved)
    import_hf(adapter, tmp_path / "upstream", str(llava_folder))
    assert len(read_non_lora_trainables(tmp_path / "upstream")) == 4
    assert_same(native, Upstream(llava_folder, tmp_path / "upstream"), pictures)


def test_back_and_forth_changes_no_number(llava_folder, tmp_path):
    adapter = write_adapter(llava_folder, tmp_path / "adapter", **WORDS)
    export_hf(adapter, tmp_path / "native", str(llava_folder))
    import_hf(tmp_path / "native" / "adapter", tmp_path / "back", str(llava_folder))
    one, other = (PeftModel.from_pretrained(plain(llava_folder), folder) for folder in (adapter, tmp_path / "back"))
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    beside = read_non_lora_trainables(adapter), read_non_lora_trainables(tmp_path / "back")
    assert beside[0].keys() == beside[1].keys()
    assert all(torch.equal(beside[0][name], beside[1][name]) for name in beside[0])


def test_another_base_is_refused(native, llava, llava_folder, tokenizer_folder, tmp_path):
    adapter = trained_on(native, tmp_path / "adapter")
    other = tmp_path / "other"
    llava.model.layers[1].mlp.up_proj.weight.data += 0.1
    llava.save_pretrained(other)
    assert "model.layers.1.mlp.up_proj.weight differs" in message_of(import_hf, adapter, tmp_path / "out", str(other))
    assert not (tmp_path / "out").exists()


def test_a_base_with_fewer_layers_or_other_embeddings_is_refused(native, llava_folder, tmp_path):
    adapter = trained_on(native, tmp_path / "adapter", layers_to_transform=[0])
    file = native.folder / "model.safetensors"
    weights = load_file(file)
    fewer = {name: weights[name] for name in weights if "vision" in name or ".layers.1." not in name}
    other = {name: weights[name] + ("embed_tokens" in name) for name in weights}
    for changed, expected in ((fewer, "model.layers.1."), (other, "embed_tokens.weight differs")):
        save_file(changed, file, {"format": "pt"})
        assert expected in message_of(import_hf, adapter, tmp_path / "out", str(llava_folder))
    assert not (tmp_path / "out").exists()


STRANGE = {
    "projector_hidden_act": "relu",
    "multimodal_projector_bias": False,
    "vision_feature_layer": [-2, -1],
    "vision_feature_select_strategy": "mean",
}


def test_what_upstreams_llava_cannot_be_is_refused(native, llava_folder, tmp_path):
    adapter, file = trained_on(native, tmp_path / "adapter"), native.folder / "config.json"
    usual = json.loads(file.read_text())
    for name, value in STRANGE.items():
        file.write_text(json.dumps({**usual, name: value}))
        assert f"{name}={value!r}" in message_of(import_hf, adapter, tmp_path / "out", str(llava_folder))
    assert not (tmp_path / "out").exists()


def test_another_tower_is_refused(native, llava_folder, tmp_path):
    next(p for name, p in native.base.named_parameters() if "post_layernorm.weight" in name).data += 1
    adapter = trained_on(native, tmp_path / "adapter")
    message = message_of(import_hf, adapter, tmp_path / "out", str(llava_folder))
    assert "post_layernorm.weight differs" in message and "--vision-tower" in message


def test_what_is_no_such_adapter_is_refused(native, llava_folder, tmp_path):
    of_upstream = write_adapter(llava_folder, tmp_path / "of-upstream")
    assert "upstream's LLaVA already" in message_of(import_hf, of_upstream, tmp_path / "out", str(llava_folder))
    adapter = trained_on(native, tmp_path / "tower", target_modules=r".*vision_tower.*q_proj")
    assert "in no decoder" in message_of(import_hf, adapter, tmp_path / "out", str(llava_folder))
    scaled = get_peft_model(Native(native.folder).base, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    scaled.save_pretrained(tmp_path / "scaled")
    assert "IA3" in message_of(import_hf, tmp_path / "scaled", tmp_path / "out", str(llava_folder))
    adapter = trained_on(Native(native.folder), tmp_path / "adapter")
    message = message_of(import_hf, adapter, tmp_path / "out", str(llava_folder), native_base=str(llava_folder))
    assert "--native-base" in message
    message = message_of(import_hf, adapter, tmp_path / "out", str(native.folder))
    assert "transformers' own LLaVA" in message


def test_a_tower_is_asked_for_where_none_is_known(native, llava_folder, tmp_path):
    adapter = trained_on(native, tmp_path / "adapter")
    (native.folder / "adapter_record.json").unlink()
    bare = tmp_path / "bare"
    bare.mkdir()
    contents = json.loads((llava_folder / "config.json").read_text())
    kept = {name: value for name, value in contents.items() if not name.startswith("mm_")}
    (bare / "config.json").write_text(json.dumps({**kept, "model_type": "llama"}))
    for file in llava_folder.iterdir():
        if file.name != "config.json":
            (bare / file.name).symlink_to(file)
    assert "--vision-tower" in message_of(import_hf, adapter, tmp_path / "out", str(bare))
