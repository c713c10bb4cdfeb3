"""What forks take and give where images enter the sequence, and names that they import, by small stand-ins."""

import importlib
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from llava_mixlora.patches import (
    llava_arch,
    llava_builder,
    llava_llama,
    llava_train_data,
    llava_trainer,
    transformers_auto,
    transformers_former_names,
)
from llava_mixlora.patches.patch import Patch, PatchError
from transformers import Trainer

from llava_mixlora import llava_package

pytestmark = pytest.mark.one_stack
IDS, MASK = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool)


def of_2023(self, input_ids, attention_mask, past_key_values, labels, images):
    """Five values; forgets embeddings where it is given no tokens."""
    if images is None:
        return input_ids, attention_mask, past_key_values, None, labels
    return None, attention_mask, past_key_values, torch.zeros(*input_ids.shape, 4), labels


def features_first(self, input_ids, attention_mask, past_key_values, labels, images):
    """Puts two features in the place of token 9, and ones for them before the mask; forgets it where it has a cache."""
    if input_ids.shape[1] == 1:
        return input_ids, attention_mask.new_ones(len(input_ids), past_key_values + 1), past_key_values, None, labels
    rows = [torch.tensor([label for token in zip(*row) for label in moved(*token)]) for row in zip(input_ids, labels)]
    sequence = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    mask = torch.zeros(sequence.shape, dtype=attention_mask.dtype)
    for row, given, own in zip(rows, attention_mask, mask):
        own[: len(row)] = torch.cat([given.new_ones(len(row) - len(given)), given])
    return None, mask, past_key_values, torch.zeros(*sequence.shape, 4), sequence


def moved(token, label):
    return (-100, -100) if token == 9 else (label,)


def with_modalities(
    self, input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities=("image",)
):
    """Six values, of as many rows as it is given modalities."""
    rows = len(modalities)
    return None, position_ids, attention_mask[:rows], None, torch.zeros(rows, 3, 4), labels[:rows]


def test_five_values_come_back_with_the_labels_of_the_tokens():
    prepare = llava_arch._tell_routing_scope(of_2023)
    labels = torch.tensor([[-100, 2, 3], [-100, -100, 6]])
    ids, mask, cache, embeddings, moved = prepare(None, IDS, MASK, None, labels, images=[1])
    assert ids is None and cache is None and embeddings.shape == (2, 3, 4)
    assert torch.equal(mask, MASK) and torch.equal(moved, labels)


@pytest.mark.parametrize(
    "ids, given, expected",
    [
        ([[0, 0, 9, 5], [4, 9, 5, 6]], [[0, 0, 1, 1], [1, 1, 1, 1]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        ([[4, 9, 0, 0], [4, 9, 5, 6]], [[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        ([[4, 5, 0, 0], [4, 9, 5, 6]], [[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
        ([[0, 4, 5, 9], [9, 9, 5, 6]], [[0, 1, 1, 1], [1, 1, 1, 1]], [[0, 1, 1, 1, 1, 0], [1] * 6]),
    ],
    ids=["left", "right", "text alone", "feature last"],
)
def test_padding_is_masked_where_features_come_before_the_mask(ids, given, expected):
    prepare = llava_arch._tell_routing_scope(features_first)
    _, mask, *_ = prepare(None, torch.tensor(ids), torch.tensor(given), None, None, images=[1])
    assert mask.tolist() == expected


def test_padding_on_the_left_stays_masked_while_an_answer_goes_on():
    prepare = llava_arch._tell_routing_scope(features_first)
    _, mask, *_ = prepare(None, torch.tensor([[7], [8]]), torch.tensor([[0, 1, 1], [1, 1, 1]]), 4, None, images=[1])
    assert mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("has_it", [True, False])
def test_towers_size_is_asked_of_models_that_have_one_vision_tower(has_it, monkeypatch):
    asked = []
    monkeypatch.setattr(llava_arch, "take_size_of", lambda *parts: asked.append(parts))
    tower = SimpleNamespace(image_processor="processor")
    model = SimpleNamespace(**({"get_vision_tower": lambda: tower} if has_it else {}))
    llava_arch._pictures_of_the_towers_size(lambda self, model_args: None)(model, model_args=None)
    assert asked == ([(tower, "processor")] if has_it else [])


def test_every_row_of_a_batch_is_given_its_modality():
    prepare = llava_arch._tell_routing_scope(with_modalities)
    *_, embeddings, _ = prepare(None, IDS, None, MASK, None, None, images=[1, 2])
    assert len(embeddings) == 2
    assert len(prepare(None, IDS, None, MASK, None, None, [1, 2], "image")[4]) == 2
    assert len(prepare(None, IDS, None, MASK, None, None, [1, 2], ["image", "video"])[4]) == 2


def test_given_embeddings_are_not_forgotten():
    prepare = llava_arch._tell_routing_scope(of_2023)

    def forward(self, input_ids=None, inputs_embeds=None):
        *_, inputs_embeds, _ = prepare(self, input_ids, MASK, None, None, None)
        return inputs_embeds

    given = torch.ones(2, 3, 4)
    assert llava_arch._keep_given_embeddings(forward)(None, inputs_embeds=given) is given
    assert llava_arch._keep_given_embeddings(forward)(None, IDS) is None


def test_masks_of_former_names_block_padding_and_what_comes_later():
    mask = torch.tensor([[1, 1, 0]])
    blocked = transformers_former_names.blocked_padding(mask, 2)
    assert blocked.tolist() == [[[[False, False, True]] * 2]]
    later = transformers_former_names.blocked_future((1, 2), past_key_values_length=1)
    assert later.tolist() == [[[[False, False, True], [False, False, False]]]]
    added = transformers_former_names.added_for_padding(mask, torch.float32)
    assert added.shape == (1, 1, 3, 3) and added[0, 0, 0].tolist() == [0, 0, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("imports, is_there, added", [(True, False, True), (False, False, False), (True, True, False)])
def test_former_name_is_put_back_where_it_is_imported_and_missing(monkeypatch, imports, is_there, added):
    import transformers.trainer

    monkeypatch.setattr(llava_package.LlavaPackage, "imports", lambda *_: imports)
    if is_there:
        monkeypatch.setattr(transformers.trainer, "FormerName", "its own", raising=False)
    patch = transformers_former_names._former(
        "transformers.trainer:FormerName", ShardedName := type("FormerName", (), {})
    )
    assert isinstance(patch, Patch)
    patch.apply()
    try:
        assert patch.applied == added
        assert getattr(transformers.trainer, "FormerName", None) == (
            ShardedName if added else "its own" if is_there else None
        )
    finally:
        patch.undo()
    assert hasattr(transformers.trainer, "FormerName") == is_there


def test_former_module_can_be_imported_until_the_patch_is_undone(monkeypatch):
    monkeypatch.setattr(llava_package.LlavaPackage, "imports", lambda *_: True)
    module = importlib.import_module("transformers.integrations")
    patch = transformers_former_names._former("transformers.former_module", lambda _: module)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformers.former_module")
    patch.apply()
    try:
        assert importlib.import_module("transformers.former_module") is module
    finally:
        patch.undo()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformers.former_module")
    there = transformers_former_names._former("transformers.trainer", lambda _: module)
    there.apply()
    assert not there.applied and sys.modules["transformers.trainer"] is not module


def test_loss_of_former_name_is_least_for_texts_with_their_own_pictures():
    own = torch.eye(3) * 10
    assert transformers_former_names.contrastive_loss(own) < 1e-3 < transformers_former_names.contrastive_loss(-own)
    rows = torch.tensor([[2.0, 0.0], [2.0, 0.0]])  # both texts take the first picture, no picture prefers a text
    log = torch.log(1 + torch.exp(torch.tensor(2.0)))
    wanted = ((log - 2 + log) / 2 + torch.log(torch.tensor(2.0))) / 2
    assert torch.allclose(transformers_former_names.contrastive_loss(rows), wanted)


def test_llava_takes_a_type_that_transformers_has_given_to_its_own():
    """LLaVA of 2023 is called "llava", as transformers' own is now; other packages are refused as before."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    def pair(module):
        config = type("LlavaConfig", (LlamaConfig,), {"model_type": "llava", "__module__": module})
        return config, type("Its", (LlamaForCausalLM,), {"config_class": config, "__module__": module})

    config, model = pair(f"{llava_package.used().name}.model")
    before, copies = AutoConfig.register, [replace(patch) for patch in transformers_auto.PATCHES]
    for patch in copies:  # of their own, for other tests may leave these applied
        patch.apply()
    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    try:
        AutoConfig.register("llava", config)
        AutoModelForCausalLM.register(config, model)
        assert mapping["llava"] is config and AutoModelForCausalLM._model_mapping[config] is model
        mapping._extra_content.pop("llava")  # what is registered once is taken everywhere
        with pytest.raises(ValueError, match="already used"):
            AutoConfig.register("llava", pair("another_package")[0])
    finally:
        for patch in copies:
            patch.undo()
        mapping._extra_content.pop("llava", None)
        AutoModelForCausalLM._model_mapping._extra_content.pop(config, None)
    assert AutoConfig.register is before


@pytest.mark.parametrize(
    "selects, tokens", [({}, 4), ({"select_feature": "patch"}, 4), ({"select_feature": "cls_patch"}, 5)]
)
def test_tower_that_selects_nothing_gives_its_patches(selects, tokens):
    tower = SimpleNamespace(num_patches=4, **selects)
    base = SimpleNamespace(get_vision_tower=lambda: tower, config=SimpleNamespace())
    trainer = SimpleNamespace(model=SimpleNamespace(get_base_model=lambda: base), args=SimpleNamespace(fp16=False))
    assert llava_trainer._step_watch(trainer).image_tokens == tokens


class Loops(Trainer):
    """Copies of the training loop, one of which its module lacks names for."""

    def __init__(self):
        pass

    def lacks(self, *_, **__):
        return MAXIMUM_THAT_NO_MODULE_HAS  # noqa: F821

    def whole(self, *_, **__):
        return len(IDS)


def test_loop_that_its_module_lacks_names_for_is_trainers_own(monkeypatch):
    monkeypatch.setattr(Trainer, "_inner_training_loop", lambda self, *args, **kwargs: (args, kwargs))
    runs = llava_trainer._loop_that_can_run(Loops.lacks)
    assert runs(Loops(), 2, args="its") == ((2,), {"args": "its"})
    for loop in (Loops.whole, Trainer._inner_training_loop):
        assert llava_trainer._loop_that_can_run(loop) is loop


def test_what_takes_any_keyword_and_nothing_else_takes_those_that_a_patch_relies_on(monkeypatch):
    monkeypatch.setattr(Loops, "__init__", lambda self, **kwargs: None)
    monkeypatch.setattr(Loops, "lacks", lambda self, given, **kwargs: None)
    for name, fits in (("__init__", True), ("lacks", False)):
        patch = Patch(f"{__name__}:Loops.{name}", "method", "of the test", replace=lambda _: 1, parameters=("model",))
        with (
            nullcontext() if fits else pytest.raises(PatchError, match="parameter 'model', found: self, given, kwargs")
        ):
            patch.apply()
        patch.undo()


def test_weights_are_not_asked_to_be_made_before_they_are_placed():
    class Model:
        @classmethod
        def from_pretrained(cls, path, **kwargs):
            return kwargs

    Model.from_pretrained = llava_llama._into_empty_weights(vars(Model)["from_pretrained"])
    assert Model.from_pretrained("base", device_map="auto", low_cpu_mem_usage=False) == {"device_map": "auto"}
    assert Model.from_pretrained("base", low_cpu_mem_usage=False) == {"low_cpu_mem_usage": False}


def test_model_goes_to_the_device_that_there_is(monkeypatch):
    def of_next(model_path, model_base, model_name, device_map="auto", **kwargs):
        return device_map, kwargs

    def of_llava(model_path, model_base, model_name, device_map="auto", device="cuda"):
        return device_map

    load = llava_builder._where_there_is_a_device(of_next)
    for has_gpu, expected in ((False, "auto"), (True, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert load("a", None, "b", device_map="cpu", choices=1) == (expected, {"choices": 1})
        assert load("a", None, "b")[0] == "auto"
    assert llava_builder._where_there_is_a_device(of_llava) is of_llava


def test_tokenizer_with_more_special_tokens_is_given_with_those_of_the_template(monkeypatch):
    def preprocess(sources, tokenizer, has_image=False):
        start, end = tokenizer.additional_special_tokens
        return start, end, tokenizer.model_max_length

    package = SimpleNamespace(places=lambda part: (part,))
    monkeypatch.setattr(llava_train_data, "used", lambda: package)
    prepare, (start, end) = llava_train_data._with_two_marks(preprocess), llava_train_data.MARKS
    more = SimpleNamespace(additional_special_tokens=[start, end, "<|box|>"], model_max_length=8)
    assert prepare([], more) == (start, end, 8)
    more.model_max_length = 9
    assert prepare([], more, has_image=True) == (start, end, 9) and len(more.additional_special_tokens) == 3
    package.places = lambda part: ()
    assert llava_train_data._with_two_marks(preprocess) is preprocess
