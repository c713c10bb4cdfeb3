"""`export-hf`: logits, tokens and answers of upstream's LLaVA and of transformers' class are the same."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from llava_mixlora import MixLoraConfig
from llava_mixlora.adapters.adapter_folder import (
    NOT_THE_LANGUAGE_MODEL,
    read_non_lora_trainables,
    write_non_lora_trainables,
)
from llava_mixlora.adapters.adapter_record import read_record
from llava_mixlora.cli import main
from llava_mixlora.inference.loading import load_for_inference
from llava_mixlora.merging.merge import merge
from llava_mixlora.native.export import export_hf
from llava_mixlora.native.processor import TRAINING_TEMPLATE

from ...tiny import LINEAR_LAYERS, layers, message_of, no_room, plain, randomise, write_adapter
from ...two_llavas import Native, Upstream
from .conftest import QUESTIONS

WORDS = {"pairing": "same", "router_scope": "instruction", "router_input": "words", "routing": "ifs"}
FORMS = {"words": WORDS, "paper": {"routing": "ifs_cfs"}, "some layers": {**WORDS, "layers_to_transform": [1]}}


@pytest.fixture(scope="module", params=FORMS)
def adapter(request, llava_folder, tmp_path_factory):
    return write_adapter(llava_folder, tmp_path_factory.mktemp("trained") / "adapter", **FORMS[request.param])


@pytest.fixture
def changed(llava_folder, tmp_path):
    """Copies the tiny LLaVA with other fields in its config.json."""

    def changed(**fields):
        folder = tmp_path / "changed"
        shutil.copytree(llava_folder, folder)
        contents = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**contents, **fields}))
        return folder

    return changed


def assert_same(upstream, native, pictures, **options):
    for picture in pictures:
        for question in QUESTIONS:
            expected = upstream.logits(picture, question, **options)
            logits = native.logits(picture, question)
            assert logits.shape[1] == expected.shape[1]
            assert torch.allclose(logits[..., : expected.shape[-1]], expected, atol=1e-5)


def test_an_adapter_gives_the_same_logits_and_answers(adapter, llava_folder, exported, pictures):
    upstream, native = Upstream(llava_folder, adapter), exported(adapter, llava_folder)
    assert_same(upstream, native, pictures)
    picture = pictures[0]
    with native.model.disable_adapter():
        without = native.logits(picture, QUESTIONS[0])
    assert not torch.allclose(native.logits(picture, QUESTIONS[0]), without, atol=1e-2)
    for question in QUESTIONS:
        assert native.written(picture, question) == upstream.written(picture, question)


def test_the_adapter_touches_the_language_model_alone(adapter, llava_folder, exported):
    native = exported(adapter, llava_folder)
    of_upstream = {name.partition("layers.")[2] for name in layers(Upstream(llava_folder, adapter).model)}
    found = set(layers(native.model))
    assert all(".language_model.layers." in name for name in found)
    assert {name.partition("layers.")[2] for name in found} == of_upstream


def test_no_image_token_is_ever_written(llava_folder, exported, pictures):
    """Its score is that of the unknown token, and generation leaves it out."""
    native = exported(llava_folder)
    logits, token = native.logits(pictures[0], QUESTIONS[0]), native.processor.image_token_id
    assert token == native.base.config.image_token_id == logits.shape[-1] - 1
    assert torch.equal(logits[..., token], logits[..., native.processor.tokenizer.unk_token_id])
    assert native.base.generation_config.suppress_tokens == [token]


def test_a_batch_is_padded_on_the_left(adapter, llava_folder, exported, pictures):
    native = exported(adapter, llava_folder)
    alone = [native.inputs(pictures[0], question) for question in QUESTIONS]
    prompts = [native.prompt(question) for question in QUESTIONS]
    batch = native.processor(images=[pictures[0]] * 3, text=prompts, padding=True, return_tensors="pt")
    assert batch.attention_mask[:, -1].all() and not batch.attention_mask.all()
    with torch.no_grad():
        together = native.model(**batch).logits[:, -1]
    for row, inputs in zip(together, alone):
        with torch.no_grad():
            assert torch.allclose(row, native.model(**inputs).logits[0, -1], atol=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_merged_checkpoint_is_loaded_without_the_plugin(
    adapter, llava_folder, pictures, tmp_path, monkeypatch, sharded
):
    if sharded:
        monkeypatch.setattr("llava_mixlora.adapters.shards.SHARD_SIZE", 20_000)
    merge(adapter, str(llava_folder), tmp_path / "merged", method="mean", force=True)
    export_hf(tmp_path / "merged", tmp_path / "native")
    assert not (tmp_path / "native" / "adapter").exists()
    assert len(list((tmp_path / "native").glob("*.safetensors"))) > 1 or not sharded
    assert_same(Upstream(tmp_path / "merged"), Native(tmp_path / "native"), pictures)
    assert read_record(tmp_path / "native").merged[0].name == str(adapter.absolute())


def test_padding_to_a_square_is_kept(changed, exported, pictures):
    folder = changed(image_aspect_ratio="pad")
    upstream, native = Upstream(folder), exported(folder)
    for picture in pictures:
        _, expected = upstream.inputs(picture, "")
        assert torch.allclose(native.inputs(picture, "").pixel_values, torch.as_tensor(expected), atol=1e-6)
    assert not torch.equal(
        native.inputs(pictures[1], "").pixel_values,
        Native(native.base.name_or_path).inputs(pictures[0], "").pixel_values,
    )
    assert_same(upstream, native, pictures)


def test_all_features_of_the_tower(changed, exported, pictures):
    folder = changed(mm_vision_select_feature="cls_patch", mm_vision_select_layer=-1)
    assert_same(Upstream(folder), exported(folder), pictures)


@pytest.mark.parametrize("version", ["llava_v1", "llava_llama_2", "v0", "mpt"])
def test_conversation_templates(version, llava_folder, tmp_path, pictures):
    export_hf(llava_folder, tmp_path / "native", version=version)
    assert_same(Upstream(llava_folder), Native(tmp_path / "native"), pictures[:1], version=version)


@pytest.mark.parametrize("version", ["v1", "llava_llama_2"])
def test_the_template_for_training_has_upstreams_tokens_and_labels(version, llava_folder, tmp_path, monkeypatch):
    """As TRL asks for them: nothing is put before a text, and the template tells what the assistant says."""
    import llava.conversation
    from llava.train.train import preprocess

    export_hf(llava_folder, tmp_path / "native", version=version)
    upstream, processor = Upstream(llava_folder), AutoProcessor.from_pretrained(tmp_path / "native")
    upstream.tokenizer.pad_token = upstream.tokenizer.unk_token  # as train() does
    monkeypatch.setattr(llava.conversation, "default_conversation", llava.conversation.conv_templates[version])
    turns = [["What color?", "red"], ["And the shape?", "A blue circle, it is."]]
    sources = [{"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair)]
    sources[0]["value"] = f"<image>\n{sources[0]['value']}"
    made = preprocess([sources], upstream.tokenizer, has_image=True)
    ids, labels = made["input_ids"][0], made["labels"][0]
    messages = [{"role": who, "content": text} for pair in turns for who, text in zip(("user", "assistant"), pair)]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": turns[0][0]}]
    for message in messages[1:]:
        message["content"] = [{"type": "text", "text": message["content"]}]
    found = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=(tmp_path / "native" / TRAINING_TEMPLATE).read_text(),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    expected = torch.where(ids == -200, processor.image_token_id, ids).tolist()
    assert found["input_ids"] == expected
    assert [bool(each) for each in found["assistant_masks"]] == (labels != -100).tolist()
    assert 4 < sum(found["assistant_masks"]) < len(ids) - 20


def test_the_template_of_the_training_is_taken(adapter, llava_folder, exported, pictures):
    record = {"format": 1, "conversation": "llava_llama_2", "merged": [], "version": "0.1.0"}
    (adapter / "adapter_record.json").write_text(json.dumps(record))
    native = exported(adapter, llava_folder)
    (adapter / "adapter_record.json").unlink()
    assert_same(Upstream(llava_folder, adapter), native, pictures[:1], version="llava_llama_2")


def test_a_projector_of_one_layer(llava, tokenizer_folder, exported, pictures, tmp_path):
    folder = tmp_path / "linear"
    config = type(llava.config)(**{**llava.config.to_dict(), "mm_projector_type": "linear"})
    type(llava)(config).save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    assert_same(Upstream(folder), exported(folder), pictures)


def test_new_tokens_and_marked_images(llava, llava_folder, tokenizer_folder, exported, pictures, tmp_path):
    """LLaVA's --mm_use_im_start_end: the embeddings, larger than the base's, lie beside the adapter."""
    from transformers import AutoTokenizer

    adapter = write_adapter(llava_folder, tmp_path / "adapter", **WORDS)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)
    before = len(llava.get_input_embeddings().weight)
    tokenizer.add_tokens([f"<filler{n}>" for n in range(before - len(tokenizer))])
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(adapter)
    weights = {
        "model.embed_tokens.weight": llava.get_input_embeddings(),
        "lm_head.weight": llava.get_output_embeddings(),
    }
    grown = {name: torch.cat([module.weight.detach(), torch.randn(2, 32)]) for name, module in weights.items()}
    prefixed = {
        f"base_model.model.{name}": tensor for name, tensor in {**read_non_lora_trainables(adapter), **grown}.items()
    }
    write_non_lora_trainables(adapter, prefixed)
    contents = json.loads((adapter / "config.json").read_text())
    fields = {"mm_use_im_start_end": True, "vocab_size": before + 2}
    (adapter / "config.json").write_text(json.dumps({**contents, **fields}))

    native = exported(adapter, llava_folder)
    model = plain(llava_folder)
    model.resize_token_embeddings(before + 2)
    model.get_vision_tower().load_model()
    upstream = Upstream.__new__(Upstream)
    upstream.model = PeftModel.from_pretrained(model, adapter).eval()
    upstream.tokenizer = AutoTokenizer.from_pretrained(adapter, use_fast=False)
    upstream.image_processor = model.get_vision_tower().image_processor
    assert torch.equal(upstream.model.get_input_embeddings().weight[-2:], grown["model.embed_tokens.weight"][-2:])
    assert_same(upstream, native, pictures, image="<im_start><image><im_end>")


def test_a_plain_lora(llava_folder, exported, pictures, tmp_path):
    targets = {"target_modules": LINEAR_LAYERS, "exclude_modules": ".*(mm_projector|vision_tower).*"}
    rank_pattern = {"model.layers.1.mlp.up_proj": 3}
    model = get_peft_model(
        plain(llava_folder), LoraConfig(r=2, rank_pattern=rank_pattern, task_type="CAUSAL_LM", **targets)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "lora")
    model.config.save_pretrained(tmp_path / "lora")
    native = exported(tmp_path / "lora", llava_folder)
    assert_same(Upstream(llava_folder, tmp_path / "lora"), native, pictures[:1])


KEPT = {
    "by an anchored name": {"alpha_pattern": {"^model.layers.1.mlp.up_proj": 40}},
    "by another expression": {"alpha_pattern": {r"^model\.[a-z]+\.1\.mlp\.up_proj": 40}},
    "a rank": {"rank_pattern": {r"(model).(layers).1.mlp.up_proj": 3}},
    "the projector": {"modules_to_save": ["mm_projector"]},
    "a norm": {"modules_to_save": ["model.norm", "lm_head"]},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("kept", KEPT)
def test_patterns_and_saved_modules_go_where_the_class_has_them(kept, llava_folder, exported, pictures, tmp_path):
    targets = {"target_modules": LINEAR_LAYERS, "exclude_modules": NOT_THE_LANGUAGE_MODEL}
    options = {**targets, **WORDS, **KEPT[kept]}
    model = plain(llava_folder)
    config = MixLoraConfig(r=2, num_factors=4, task_type="CAUSAL_LM", **options)
    adapted = randomise(get_peft_model(model, config), scale=0.3)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name or ("bias" in options and name.endswith(".bias")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    native = exported(tmp_path / "adapter", llava_folder)
    assert_same(Upstream(llava_folder, tmp_path / "adapter"), native, pictures[:1])


def test_what_cannot_be_renamed_is_refused(llava_folder, tmp_path):
    def refused(config, with_tower=False, **options):
        model = plain(llava_folder)
        if with_tower:
            model.get_vision_tower().load_model()
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter", **options)
        model.config.save_pretrained(tmp_path / "adapter")
        return message_of(export_hf, tmp_path / "adapter", tmp_path / "native", str(llava_folder))

    kinds = {"target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    assert "IA3" in refused(IA3Config(feedforward_modules=["down_proj"], **kinds))
    assert "vision tower" in refused(LoraConfig(bias="all", **kinds), with_tower=True)
    of_head = LoraConfig(target_modules=["down_proj", "lm_head"], task_type="CAUSAL_LM")
    assert "lm_head" in refused(of_head, save_embedding_layers=False)
    assert not (tmp_path / "native").exists()


def test_every_token_that_ends_an_answer_is_kept(changed, exported, pictures):
    """A Llama 3 has several, in its generation_config.json alone."""
    folder = changed()
    written = Upstream(folder).written(pictures[0], QUESTIONS[0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, written[1]]}))
    assert Upstream(folder).written(pictures[0], QUESTIONS[0]) == written[:2]
    assert exported(folder).written(pictures[0], QUESTIONS[0]) == written[:2]


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings(with_head, changed, exported, pictures):
    folder = changed(tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    if with_head:  # as pickled checkpoints have it
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same(Upstream(folder), exported(folder), pictures[:1])


def test_nothing_is_put_before_a_text_where_the_tokenizer_puts_nothing(changed, exported, pictures):
    folder = changed()
    for file in folder.glob("*token*"):
        file.unlink()
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    own.train_from_iterator(["red"], trainers.BpeTrainer(special_tokens=["<end>", "<begin>"], **letters))
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", bos_token="<begin>").save_pretrained(folder)
    native = exported(folder)
    assert_same(Upstream(folder), native, pictures[:1])
    template = (native.folder / TRAINING_TEMPLATE).read_text()
    asked = [{"role": "user", "content": "red"}]
    assert "<begin>" not in native.processor.tokenizer.apply_chat_template(
        asked, chat_template=template, tokenize=False
    )


def test_a_full_disk_leaves_nothing(llava_folder, tmp_path):
    for size in (2_000, 20_000, 60_000):  # bytes of a file: within the tokenizer, and within the weights
        with no_room(size):
            assert "make room" in message_of(export_hf, llava_folder, tmp_path / "native")
        assert not list(tmp_path.iterdir())


def test_an_incomplete_base_is_refused(changed, tmp_path):
    folder = changed()
    weights = load_file(folder / "model.safetensors")
    whole = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "layers.1.mlp.up_proj.weight" in message_of(export_hf, folder, tmp_path / "native")
    save_file(
        {**weights, "model.layers.1.mlp.up_proj.weight": whole[1:]}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "has the shape" in message_of(export_hf, folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_the_card_and_the_record_tell_of_it(adapter, llava_folder, exported, capsys):
    native = exported(adapter, llava_folder)
    folder = native.model.peft_config["default"].base_model_name_or_path
    card = (native.folder / "adapter" / "README.md").read_text()
    assert "LlavaForConditionalGeneration" in card
    assert folder == str(native.folder)
    assert read_record(native.folder / "adapter").base.name_or_path == folder
    assert main(["inspect", str(native.folder / "adapter")]) == 0
    assert "language_model" in capsys.readouterr().out


WRONG = {
    "model_type": ({"model_type": "llama"}, "model_type='llama'"),
    "transformers' own": ({"model_type": "llava"}, "transformers' own LLaVA already"),
    "mpt": ({"model_type": "llava_mpt"}, "model_type='llava_mpt'"),
    "projector": ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu'"),
    "other projector": ({"mm_projector_type": "linear"}, "a projector of the form linear was expected"),
    "tiles": ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
    "scales": ({"s2": True}, "s2=True"),
    "no layer": ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer='-2'"),
    "first layer": ({"mm_vision_select_layer": 0}, "mm_vision_select_layer=0"),
    "no tower": ({"mm_vision_tower": None}, "mm_vision_tower=None"),
    "tower": ({"mm_vision_tower": "/nowhere"}, "/nowhere"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_class_cannot_be_is_refused(wrong, changed, tmp_path):
    fields, expected = WRONG[wrong]
    assert expected in message_of(export_hf, changed(**fields), tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_template_without_questions_is_refused(llava_folder, tmp_path):
    for version in ("plain", "v1_mmtag", "nonsense"):
        message = message_of(export_hf, llava_folder, tmp_path / "native", version=version)
        assert "--version" in message and version in message
    assert not (tmp_path / "native").exists()


def test_a_language_model_alone_is_refused(changed, tmp_path):
    folder = changed()
    weights = {n: t for n, t in load_file(folder / "model.safetensors").items() if "mm_projector" not in n}
    save_file(weights, folder / "model.safetensors")
    assert "there is none" in message_of(export_hf, folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_what_is_there_is_not_written_over(llava_folder, tmp_path):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "mine").touch()
    assert "--save-model-path" in message_of(export_hf, llava_folder, tmp_path / "native")
    assert "a whole model" in message_of(export_hf, llava_folder, tmp_path / "other", str(llava_folder))


def test_each_adapter_says_for_which_llava_it_is(adapter, llava_folder, exported, tmp_path):
    native = exported(adapter, llava_folder)
    fresh = Native(native.folder)
    assert "export-hf" in message_of(PeftModel.from_pretrained, fresh.base, adapter)
    by_layer = {"target_modules": r"model\.layers\.1\.mlp\.up_proj", "task_type": "CAUSAL_LM"}
    assert "export-hf" in message_of(get_peft_model, Native(native.folder).base, MixLoraConfig(**by_layer))
    assert "import-hf" in message_of(PeftModel.from_pretrained, plain(llava_folder), native.folder / "adapter")
    assert "import-hf" in message_of(export_hf, native.folder / "adapter", tmp_path / "again", str(llava_folder))
    assert "import-hf" in message_of(merge, native.folder / "adapter", None, tmp_path / "merged")
    assert "import-hf" in message_of(load_for_inference, native.folder / "adapter")
    assert "import-hf" in message_of(load_for_inference, native.folder)
