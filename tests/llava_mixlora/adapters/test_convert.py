"""The authors' checkpoints (tests/golden/README.md) as adapters: their numbers again, and every kind of bad input."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from llava_mixlora import MixLoraError
from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES
from llava_mixlora.adapters.convert import convert, read_options
from llava_mixlora.cli import main

from ...tiny import layers, no_room

GOLDEN = Path(__file__).parents[2] / "golden"
PREFIX = "base_model.model."


@pytest.fixture(params=["model_ifs", "model_ifs_cfs"])
def golden(request):
    return GOLDEN / request.param


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the authors' IFS+CFS checkpoint to damage."""
    return shutil.copytree(GOLDEN / "model_ifs_cfs", tmp_path / "checkpoint")


@pytest.fixture
def converted(checkpoint, tmp_path):
    """Convert the copy, against its own base."""

    def run(base=None, output=None, **options):
        output = tmp_path / "out" if output is None else output
        convert(checkpoint, str(base or checkpoint / "base_llm"), output, **options)
        return output

    return run


def edit(checkpoint, change):
    """Rewrite the state dict after `change`."""
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, checkpoint / "pytorch_model.bin")


def edit_options(checkpoint, **options):
    file = checkpoint / "cmoa_args.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def loaded_by_peft(base, adapter):
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(base, config=LlavaConfig.from_pretrained(adapter))
    beside = torch.load(adapter / NON_LORA_TRAINABLES, weights_only=True)
    unknown = model.load_state_dict({name.removeprefix(PREFIX): p for name, p in beside.items()}, strict=False)[1]
    assert unknown == []
    model.get_vision_tower().load_model()
    return PeftModel.from_pretrained(model, adapter).eval()


def greedy(model, numbers):
    """Eight tokens by cached greedy decoding, one row at a time."""
    model.get_base_model().generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    rows = zip(numbers["input_ids"].split(1), numbers["images"].to(model.dtype).split(1))
    # transformers 4.37 begins with the token that begins a text.
    return torch.cat([model.generate(ids, images=images, **options)[:, -8:] for ids, images in rows])


def test_logits_and_greedy_tokens_equal_the_authors(patched, golden, tmp_path):
    convert(golden, str(golden / "base_llm"), tmp_path / "out", str(golden / "vision_tower"))
    model, numbers = loaded_by_peft(golden / "base_llm", tmp_path / "out"), load_file(golden / "io.safetensors")
    assert len(layers(model)) == 14
    with torch.no_grad():
        logits = model(input_ids=numbers["input_ids"], images=numbers["images"]).logits
    torch.testing.assert_close(logits, numbers["logits"], atol=1e-4, rtol=0)
    assert torch.equal(greedy(model, numbers), numbers["greedy_tokens"])


def test_result_is_loaded_by_upstream(patched, golden, tmp_path):
    from llava.model import builder
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    base = shutil.copytree(golden / "base_llm", tmp_path / "base")
    words = {f"word{index}": index for index in range(96)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "word0"))).save_pretrained(base)
    convert(golden, str(base), tmp_path / "out", str(golden / "vision_tower"))
    _, model, _, _ = builder.load_pretrained_model(str(tmp_path / "out"), None, "converted", device="cpu")
    numbers = load_file(golden / "io.safetensors")
    with torch.no_grad():
        in_full_precision(model, golden)  # upstream loads the base in half, which may tip a router over
        if hasattr(model.get_model().layers[0].self_attn, "rotary_emb"):
            pytest.skip("this transformers keeps the positions of a model loaded in half in half")
        logits = model(input_ids=numbers["input_ids"], images=numbers["images"]).logits
    torch.testing.assert_close(logits, numbers["logits"], atol=1e-4, rtol=0)
    assert torch.equal(greedy(model, numbers), numbers["greedy_tokens"])


def in_full_precision(model, golden):
    """Undo the rounding of a model that was loaded in half precision: put in the checkpoint's own base weights."""
    state = torch.load(golden / "pytorch_model.bin", weights_only=True)
    parameters = {name.replace(".base_layer", ""): p for name, p in model.float().named_parameters()}
    restored = [name for name in state if name in parameters]
    for name in restored:
        parameters[name].data = state[name]
    assert len(restored) >= 21 + 2  # the language model and the projector; some towers are named anew by transformers
    tower = model.get_vision_tower()
    tower.is_loaded = False
    tower.load_model()


def test_adapter_has_the_authors_settings(converted):
    config = PeftConfig.from_pretrained(converted())
    assert (config.r, config.num_factors, config.lora_alpha, config.routing) == (3, 8, 16, "ifs_cfs")
    assert (config.router_gradient, config.router_scope, config.count_padding) == ("none", "sequence", True)
    assert (config.decode_routing, config.cfs_product, config.inference_mode) == ("step", "sums", True)
    assert (config.pairing, config.router_input, config.cfs, config.cfs_temperature) == ("rank", "hidden", "weights", 1)


def test_adapter_is_of_the_first_format_which_older_versions_read(converted):
    assert json.loads((converted() / "adapter_config.json").read_text())["format_version"] == 1


def test_pickled_options_say_the_same_as_json(golden, tmp_path):
    (tmp_path / "pickled").mkdir()
    shutil.copy(golden / "cmoa_args.bin", tmp_path / "pickled")
    assert read_options(tmp_path / "pickled") == read_options(golden)


def test_configuration_is_upstreams_and_keeps_what_the_checkpoint_says(converted, checkpoint):
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, converted()))
    assert after["model_type"] == "llava_llama" and after["architectures"] == ["LlavaLlamaForCausalLM"]
    for name in ("mm_vision_tower", "mm_vision_select_layer", "mm_hidden_size", "vocab_size", "use_mm_proj"):
        assert after[name] == before[name]
    assert "use_cmoa" not in after and "cond_type" not in after


def test_vision_tower_can_be_named_anew(converted, checkpoint):
    tower = str(checkpoint / "vision_tower")
    assert json.loads((converted(vision_tower=tower) / "config.json").read_text())["mm_vision_tower"] == tower


def test_only_the_projector_lies_beside_the_adapter_of_a_frozen_base(converted):
    beside = torch.load(converted() / NON_LORA_TRAINABLES, weights_only=True)
    assert set(beside) == {f"{PREFIX}model.mm_projector.weight", f"{PREFIX}model.mm_projector.bias"}


def test_trained_norms_and_embeddings_lie_beside_the_adapter(converted, checkpoint):
    trained = ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"]
    edit(checkpoint, lambda state: [state[PREFIX + name].add_(1e-3) for name in trained])
    beside = torch.load(converted() / NON_LORA_TRAINABLES, weights_only=True)
    assert {PREFIX + name for name in trained} < set(beside) and len(beside) == 5


def test_shards_are_read_like_one_file(converted, checkpoint, tmp_path):
    whole = load_file(converted() / "adapter_model.safetensors")
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    shards = {name: f"pytorch_model-{1 + position % 2:05}-of-00002.bin" for position, name in enumerate(state)}
    for file in set(shards.values()):
        torch.save({name: state[name] for name in state if shards[name] == file}, checkpoint / file)
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (checkpoint / "pytorch_model.bin").unlink()
    sharded = load_file(converted(output=tmp_path / "sharded") / "adapter_model.safetensors")
    assert whole.keys() == sharded.keys() and all(torch.equal(whole[name], sharded[name]) for name in whole)
    (checkpoint / sorted(set(shards.values()))[1]).unlink()
    assert "00002-of-00002.bin is missing" in message_of(converted, output=tmp_path / "third")


def test_base_in_another_precision_is_the_same_base(converted, checkpoint, tmp_path):
    base = shutil.copytree(checkpoint / "base_llm", tmp_path / "base")
    state = torch.load(base / "pytorch_model.bin", weights_only=True)
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, base / "model.safetensors")
    (base / "pytorch_model.bin").unlink()
    assert (converted(base) / "adapter_model.safetensors").is_file()


def test_layers_without_an_adapter_stay_without_one(patched, converted, checkpoint):
    """The first decoder layer, and one kind of the second, were not adapted."""
    bare = ("layers.0.", "layers.1.mlp.up_proj.")
    extra = ("lora_", "selector")

    def drop(state):
        for name in [name for name in state if any(b in name for b in bare) and any(e in name for e in extra)]:
            del state[name]

    edit(checkpoint, drop)
    out = converted(vision_tower=str(checkpoint / "vision_tower"))
    adapted = layers(loaded_by_peft(checkpoint / "base_llm", out))
    assert len(adapted) == 6 and all("layers.1." in name and "up_proj" not in name for name in adapted)


# --- bad input: one line, and nothing is left behind


def message_of(convert, **options):
    with pytest.raises(MixLoraError) as error:
        convert(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def message(converted, tmp_path):
    """Convert and return the error; nothing may be left where the output would have been."""

    def message(**options):
        text = message_of(converted, **options)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        return text

    return message


@pytest.mark.parametrize("kept", [0, 10, 5_000, 600_000])
def test_truncated_checkpoint_is_named(message, checkpoint, kept):
    weights = checkpoint / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "pytorch_model.bin is damaged" in message()


def test_one_flipped_bit_inside_a_tensor_is_found(message, checkpoint):
    weights = checkpoint / "pytorch_model.bin"
    content = bytearray(weights.read_bytes())
    tensor = torch.load(weights, weights_only=True)[f"{PREFIX}lm_head.weight"].numpy().tobytes()
    content[content.index(tensor) + 7] ^= 1
    weights.write_bytes(content)
    assert "pytorch_model.bin is damaged" in message()


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "cmoa_args.bin"])
def test_pickled_code_is_never_executed(message, checkpoint, tmp_path, file):
    (checkpoint / "cmoa_args.json").unlink()
    torch.save(argparse.Namespace(bomb=Bomb(tmp_path / "exploded")), checkpoint / file)
    assert "not executed" in message() and file in message()
    assert not (tmp_path / "exploded").exists()


def test_state_dict_of_something_else_is_refused(message, checkpoint):
    torch.save([torch.zeros(1)], checkpoint / "pytorch_model.bin")
    assert "expected a state dict of tensors by name, got list" in message()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "config.json"])
def test_missing_files_are_named(message, checkpoint, file):
    (checkpoint / file).unlink()
    assert file in message()


def test_missing_options_are_named(message, checkpoint):
    for file in ("cmoa_args.json", "cmoa_args.bin"):
        (checkpoint / file).unlink()
    assert "cmoa_args.bin is missing" in message()


def test_missing_checkpoint_and_base_are_named(message, checkpoint, tmp_path):
    assert "/no/base: no such folder" in message(base="/no/base")
    shutil.rmtree(checkpoint)
    assert "checkpoint: no such folder" in message(base=tmp_path)


@pytest.mark.parametrize("file", ["config.json", "cmoa_args.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_json_is_named(message, checkpoint, file, content):
    (checkpoint / file).write_text(content)
    assert f"{file} is damaged" in message()


def test_pools_of_different_size_are_named(message, checkpoint):
    layer = f"{PREFIX}model.layers.1.mlp.up_proj"
    edit(checkpoint, lambda state: state.pop(f"{layer}.lora_B.default.7"))
    assert "model.layers.1.mlp.up_proj: pool B has 7 factors, but cmoa_args says n_experts=8" in message()


def test_options_of_another_run_are_noticed(message, checkpoint):
    edit_options(checkpoint, n_experts=6)
    assert "pool A has 8 factors, but cmoa_args says n_experts=6" in message()
    edit_options(checkpoint, n_experts=8, n_selected=2)
    assert "loraA_param2loraB_selector.weight has the shape [8, 96], expected [8, 64]" in message()
    edit_options(checkpoint, n_selected=3, cond_type="input")
    assert "cmoa_selector.loraB_selector.weight is missing" in message()


@pytest.mark.parametrize(
    "option", [{"cond_type": "attr"}, {"used_scored_weight": True}, {"independent_rank": False}, {"ifs_weight": 0.5}]
)
def test_options_without_an_equal_here_are_refused(message, checkpoint, option):
    edit_options(checkpoint, **option)
    ((name, value),) = option.items()
    assert f"{name}={value!r} cannot be converted" in message()


def test_option_that_is_no_number_is_refused(message, checkpoint):
    edit_options(checkpoint, n_selected="3")
    assert "n_selected='3': expected a whole number" in message()


def test_checkpoint_without_an_adapter_is_refused(message, checkpoint):
    shutil.copy(checkpoint / "base_llm" / "pytorch_model.bin", checkpoint)
    assert "holds no adapter" in message()


def test_layer_with_a_plain_lora_is_refused(message, checkpoint):
    edit(
        checkpoint,
        lambda state: state.update({f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.default.weight": torch.zeros(3, 32)}),
    )
    assert "holds a plain LoRA" in message()


def test_base_of_other_weights_is_refused(message, checkpoint):
    edit(checkpoint, lambda state: state[f"{PREFIX}model.layers.1.self_attn.v_proj.weight"].mul_(1.1))
    text = message()
    assert "for another base" in text and "layers.1.self_attn.v_proj.weight differs" in text


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_base_of_other_shapes_is_refused(message, checkpoint, name):
    def widen(state):
        state[name] = torch.zeros(len(state[name]) + 1, state[name].shape[1])

    edit(checkpoint / "base_llm", widen)
    text = message()
    assert "for another base" in text and name in text


def test_base_with_fewer_layers_is_refused(message, checkpoint):
    edit(checkpoint / "base_llm", lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    assert "for another base" in message()


def test_other_vision_tower_is_refused(message, checkpoint, clip_folder):
    assert "another vision tower" in message(vision_tower=str(clip_folder))


def test_existing_output_is_kept(converted, tmp_path):
    (tmp_path / "out").mkdir()
    converted()  # into an empty folder
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "exists and is not an empty folder" in message_of(converted)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert "exists" in message_of(converted, output=tmp_path / "out" / "config.json")


def test_output_that_cannot_be_written_is_named(converted, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message_of(converted, output=tmp_path / "file" / "out")


def test_command_line_converts(checkpoint, tmp_path, capsys):
    base, out = str(checkpoint / "base_llm"), str(tmp_path / "out")
    words = ["convert", str(checkpoint), "--model-base", base, "--output", out]
    assert main(words) == 0
    assert out in capsys.readouterr().out
    assert main(words) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("llava-mixlora: error: --output ")


def test_card_tells_how_llava_loads_it(converted):
    adapter = converted()
    card = (adapter / "README.md").read_text()
    assert f"# {adapter.name}: a MixLoRA adapter" in card and "llava-mixlora run -m llava.serve.cli" in card
    assert "| router_gradient | none |" in card and "Data and hyperparameters are not recorded." in card


def test_full_disk_is_one_line_and_leaves_nothing(message):
    with no_room(2_000):
        assert "could not be written (File too large)" in message()


@pytest.mark.parametrize("value", [10**12, 4097, 0, -1, 2.5, True, None, "8"])
def test_pools_of_impossible_sizes_are_refused_at_once(message, checkpoint, value):
    edit_options(checkpoint, n_experts=value)
    assert f"n_experts={value!r}: expected a whole number from 1 to 4096" in message()
