"""The door for adapters: what training leaves passes, and what is incomplete, untrue or hostile does not."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llava_mixlora import MixLoraConfig
from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES, NOT_THE_LANGUAGE_MODEL, write_non_lora_trainables
from llava_mixlora.adapters.adapter_record import RECORD
from llava_mixlora.adapters.reading import read, read_mixlora
from llava_mixlora.method.stored_tensors import allowing_incomplete

from ...tiny import LINEAR_LAYERS, message_of, plain, randomise, write_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.1.mlp.up_proj"
PROJECTOR = "base_model.model.model.mm_projector"


@pytest.fixture(scope="module")
def originals(llava_folder, patched, tmp_path_factory):
    """By kind, adapters as LLaVA's training writes them: of the paper's form, of today's default, and a plain LoRA."""
    place = tmp_path_factory.mktemp("adapters")
    write_adapter(llava_folder, place / "mixlora")
    options = {"target_modules": LINEAR_LAYERS, "task_type": "CAUSAL_LM"}
    kinds = {
        "words": MixLoraConfig(r=2, num_factors=6, exclude_modules=NOT_THE_LANGUAGE_MODEL, **options),
        "lora": LoraConfig(r=3, **options),
    }
    for name, config in kinds.items():
        model = randomise(get_peft_model(plain(llava_folder), config))
        model.save_pretrained(place / name)
        for file in ("config.json", NON_LORA_TRAINABLES):
            shutil.copy(place / "mixlora" / file, place / name)
    return place


@pytest.fixture
def adapter(originals, tmp_path):
    """Makes a copy of one of them to damage."""
    return lambda kind="mixlora": shutil.copytree(originals / kind, tmp_path / kind)


def change(folder, **tensors):
    stored = {**load_file(folder / WEIGHTS), **tensors}
    save_file({name: each for name, each in stored.items() if each is not None}, folder / WEIGHTS)


def change_beside(folder, **tensors):
    stored = {**torch.load(folder / NON_LORA_TRAINABLES, weights_only=True), **tensors}
    stored = {name: each for name, each in stored.items() if each is not None}
    torch.save(stored, folder / NON_LORA_TRAINABLES)


def configure(folder, file=CONFIG, **fields):
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))


@pytest.mark.parametrize("kind", ["mixlora", "words", "lora"])
@pytest.mark.parametrize("with_base", [True, False])
def test_what_training_leaves_passes(adapter, llava_folder, kind, with_base):
    found = read(adapter(kind), str(llava_folder) if with_base else None)
    assert found.is_mixlora == (kind != "lora") and found.llava["model_type"] == "llava_llama"
    assert len(found.beside) == 4 and dict(found.tensors()).keys() == found.forms.keys()


@pytest.mark.parametrize("kind", ["mixlora", "words", "lora"])
def test_adapter_without_anything_of_llava_passes(adapter, llava_folder, kind):
    folder = adapter(kind)
    (folder / "config.json").unlink()
    (folder / NON_LORA_TRAINABLES).unlink()
    assert read(folder).llava is None and read(folder, str(llava_folder)).beside == {}


UNTRUE = {
    "a layer is missing": (
        lambda f: change(f, **dict.fromkeys(n for n in load_file(f / WEIGHTS) if LAYER in n)),
        "lacks",
    ),
    "a decoder layer is missing": (
        lambda f: change(f, **dict.fromkeys(n for n in load_file(f / WEIGHTS) if "layers.1." in n)),
        "(35 of ",
    ),
    "nothing is there": (lambda f: save_file({}, f / WEIGHTS), "holds no tensors of a MIXLORA adapter"),
    "routers are missing": (
        lambda f: change(f, **dict.fromkeys(n for n in load_file(f / WEIGHTS) if "router" in n)),
        "lacks",
    ),
    "a layer too many": (
        lambda f: change(f, **{f"{LAYER}.mixlora_A".replace("layers.1", "layers.2"): torch.zeros(6, 32)}),
        "holds model.layers.2",
    ),
    "NaN": (lambda f: change(f, **{f"{LAYER}.mixlora_A": torch.full((6, 32), torch.nan)}), "are not finite"),
    "int8": (lambda f: change(f, **{f"{LAYER}.mixlora_A": torch.ones(6, 32, dtype=torch.int8)}), "is stored as I8"),
    "another width": (lambda f: change(f, **{f"{LAYER}.mixlora_A": torch.ones(6, 31)}), "expected [6, 32]"),
    "another width of B": (lambda f: change(f, **{f"{LAYER}.mixlora_B": torch.ones(6, 47)}), "expected [6, 48]"),
    "a foreign head": (
        lambda f: change(f, **{"base_model.model.lm_head.weight": torch.zeros(320, 32)}),
        "holds lm_head.weight",
    ),
    "a saved module is missing": (
        lambda f: configure(f, modules_to_save=["embed_tokens"]),
        "lacks embed_tokens.*",
    ),
    "a saved module is an adapted layer": (lambda f: configure(f, modules_to_save=["q_proj"]), "lacks q_proj.*"),
    "no name of a tower": (lambda f: configure(f, "config.json", mm_vision_tower="x" * 300), "expected a name"),
    "random routing": (lambda f: configure(f, routing="random"), "mixlora_router_A"),
    "lora_alpha twice": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace("{", '{"lora_alpha": 1,', 1)),
        "names 'lora_alpha' twice",
    ),
    "lora_alpha NaN": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": NaN')),
        "holds NaN",
    ),
    "many factors": (lambda f: configure(f, num_factors=10**7), "expected 4096 at most"),
    "many layers": (lambda f: configure(f, "config.json", num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "an endless expression": (lambda f: configure(f, target_modules="(.*)*x"), "could take minutes"),
    "an endless exclusion": (lambda f: configure(f, exclude_modules="(.*)*x"), "could take minutes"),
    "truncated": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:99]), "not valid JSON"),
    "wrong types": (lambda f: configure(f, base_model_name_or_path=[1]), "base_model_name_or_path=[1]"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "truncated weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:99]), "is damaged"),
    "no projector": (lambda f: (f / NON_LORA_TRAINABLES).unlink(), "lacks model.mm_projector.0.weight"),
    "an empty projector": (lambda f: torch.save({}, f / NON_LORA_TRAINABLES), "lacks model.mm_projector.0.weight"),
    "half a projector": (
        lambda f: change_beside(f, **{f"{PROJECTOR}.0.bias": None}),
        "lacks model.mm_projector.0.bias",
    ),
    "a projector of NaN": (
        lambda f: change_beside(f, **{f"{PROJECTOR}.0.bias": torch.full((32,), torch.nan)}),
        "finite",
    ),
    "another projector": (lambda f: change_beside(f, **{f"{PROJECTOR}.0.weight": torch.zeros(32, 15)}), "[32, 16]"),
    "no numbers in it": (
        lambda f: change_beside(f, **{f"{PROJECTOR}.0.weight": torch.zeros(32, 0)}),
        "has the shape [32, 0]",
    ),
    "too much projector": (
        lambda f: change_beside(f, **{f"{PROJECTOR}.4.bias": torch.zeros(3)}),
        "mm_projector.4.bias",
    ),
    "a weight of the base": (
        lambda f: change_beside(f, **{"base_model.model.model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}),
        "holds model.layers.0.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("harm", UNTRUE)
def test_untrue_adapters_are_refused(adapter, harm):
    folder = adapter()
    damage, words = UNTRUE[harm]
    damage(folder)
    said = message_of(read, folder)
    assert words in said and str(folder) in said


OF_LORA = {
    "a layer is missing": (
        lambda f: change(f, **dict.fromkeys(n for n in load_file(f / WEIGHTS) if LAYER in n)),
        "lacks",
    ),
    "half a layer": (
        lambda f: change(f, **{f"{LAYER}.lora_B.weight": None}),
        "lacks model.layers.1.mlp.up_proj.lora_B",
    ),
    "nothing": (lambda f: save_file({}, f / WEIGHTS), "holds no tensors of a LoRA"),
    "NaN": (lambda f: change(f, **{f"{LAYER}.lora_A.weight": torch.full((3, 32), torch.nan)}), "are not finite"),
    "another rank": (lambda f: change(f, **{f"{LAYER}.lora_A.weight": torch.ones(2, 32)}), "no rank in common"),
    "another width": (lambda f: change(f, **{f"{LAYER}.lora_A.weight": torch.ones(3, 31)}), "expected [any, 32]"),
    "a foreign head": (lambda f: change(f, **{"base_model.model.lm_head.weight": torch.ones(9, 9)}), "lm_head.weight"),
    "an endless expression": (lambda f: configure(f, target_modules="(.*)*x"), "could take minutes"),
    "rank": (lambda f: configure(f, r="3"), "r='3'"),
    "no projector": (lambda f: (f / NON_LORA_TRAINABLES).unlink(), "lacks model.mm_projector.0.weight"),
}


@pytest.mark.parametrize("harm", OF_LORA)
def test_untrue_plain_loras_are_refused(adapter, harm):
    folder = adapter("lora")
    damage, words = OF_LORA[harm]
    damage(folder)
    assert words in message_of(read, folder)


def test_fields_of_a_plain_lora_that_name_modules_are_not_taken(adapter):
    folder = adapter("lora")
    configure(folder, megatron_config={"a": 1}, megatron_core="antigravity", layer_replication=[[0, 10**9]])
    config = read(folder).config
    assert config.megatron_config is None and config.layer_replication is None


@pytest.mark.parametrize("kind", ["NEW", None, ["LORA"], 3])
def test_adapters_of_no_known_type_are_named(adapter, kind):
    folder = adapter()
    configure(folder, peft_type=kind)
    assert f"peft_type={kind!r}" in message_of(read, folder)


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["q_proj"]}], ids=str)
def test_adapter_without_a_type_is_named(adapter, fields):
    folder = adapter("lora")
    (folder / CONFIG).write_text(json.dumps(fields))
    assert "peft_type=None" in message_of(read, folder)


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING"])
def test_adapter_of_another_method_is_left_to_it(adapter, kind):
    folder = adapter("lora")
    (folder / CONFIG).write_text(json.dumps({"peft_type": kind}))
    assert not read(folder).is_mixlora


def test_plain_lora_is_no_mixlora_adapter(adapter):
    assert "peft_type='LORA'" in message_of(read_mixlora, adapter("lora"))


def test_base_of_other_shapes_is_refused(adapter, llava_folder, tmp_path):
    folder, base = adapter(), tmp_path / "base"
    (folder / "config.json").unlink()
    (folder / NON_LORA_TRAINABLES).unlink()
    shutil.copytree(llava_folder, base)
    configure(base, "config.json", intermediate_size=50)
    assert "expected [6, 50]" in message_of(read, folder, str(base))
    (base / "config.json").unlink()
    assert f"base model {base}: it has no config.json" in message_of(read, folder, str(base))


def test_head_in_the_place_of_the_bases_is_refused_and_one_of_new_tokens_is_not(adapter, llava_folder):
    folder = adapter()
    head = "base_model.model.lm_head.weight"
    change_beside(folder, **{head: torch.zeros(321, 32)})
    assert "lm_head.weight" in read(folder, str(llava_folder)).beside
    change_beside(folder, **{head: torch.zeros(320, 32)})
    assert "holds lm_head.weight" in message_of(read, folder, str(llava_folder))


def test_incomplete_adapters_pass_where_that_is_allowed(adapter):
    folder = adapter()
    change(folder, **{f"{LAYER}.mixlora_A": None})
    (folder / NON_LORA_TRAINABLES).unlink()
    assert "(commands that ask a model load it as it is with --allow-incomplete)" in message_of(read, folder)
    with allowing_incomplete():
        read(folder)


def test_frozen_projector_may_be_the_bases(adapter):
    folder = adapter()
    (folder / NON_LORA_TRAINABLES).unlink()
    configure(folder, "config.json", freeze_mm_mlp_adapter=True)
    assert read(folder).beside == {}


def test_projector_that_was_not_trained_is_the_bases_where_that_has_one(adapter, llava_folder, llama_folder):
    folder = adapter()
    (folder / NON_LORA_TRAINABLES).unlink()
    fields = json.loads((folder / "config.json").read_text())
    del fields["freeze_mm_mlp_adapter"]  # as of who trains in Python
    (folder / "config.json").write_text(json.dumps(fields))
    assert read(folder, str(llava_folder)).beside == read(folder).beside == {}
    assert "lacks model.mm_projector.0.weight" in message_of(read, folder, str(llama_folder))
    (folder / RECORD).write_text("{}")
    assert "lacks model.mm_projector.0.weight" in message_of(read, folder, str(llava_folder))


def test_projector_is_read_as_safetensors_where_it_is_there(adapter):
    folder = adapter()
    write_non_lora_trainables(folder, torch.load(folder / NON_LORA_TRAINABLES, weights_only=True))
    (folder / NON_LORA_TRAINABLES).unlink()
    assert len(read(folder).beside) == 4


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "config.json", NON_LORA_TRAINABLES])
def test_links_out_of_the_folder_are_not_followed(adapter, tmp_path, name):
    folder = adapter()
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"{folder / name} is a link to" in message_of(read, folder)


def test_snapshot_in_the_cache_of_the_hub_passes(adapter, tmp_path):
    repository = tmp_path / "models--owner--adapter"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    adapter().rename(repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(read(snapshot).beside) == 4
