"""transformers' own vision-language models, tiny and random, with pictures: what is adapted, trained, asked, merged."""

import re

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn

from llava_mixlora import MixLoraConfig, known_prompt
from llava_mixlora.method.model_inputs import image_positions

from ...tiny import layers, randomise

IMAGE = 310
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": 16, "patch_size": 8}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
SMALL_PATCHES = {**TOWER, "image_size": 16, "patch_size": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
QWEN_TEXT = {**TEXT, "rope_parameters": MROPE, "rope_scaling": MROPE}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 313}
SMOL = {
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": SMALL_PATCHES,
    "image_token_id": IMAGE,
    "scale_factor": 2,
}
MLLAMA_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "vision_output_dim": 32,
    "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1], [1, 2]],
    "max_num_tiles": 2,
}
MODELS = {
    "Llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": CLIP,
        "image_token_index": IMAGE,
    },
    "LlavaNext": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": CLIP,
        "image_token_index": IMAGE,
        "image_grid_pinpoints": [[16, 16], [16, 32]],
    },
    "LlavaOnevision": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": SIGLIP,
        "image_token_index": IMAGE,
        "video_token_index": 311,
        "image_grid_pinpoints": [[16, 16]],
    },
    "Qwen2VL": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "Qwen2_5_VL": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
        **QWEN_TOKENS,
    },
    "Qwen3VL": {
        "text_config": {**QWEN_TEXT, "head_dim": 8},
        "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "SmolVLM": SMOL,
    "Idefics3": SMOL,
    "InternVL": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "PaliGemma": {
        "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
        "vision_config": {**SIGLIP, "projection_dim": 32},
        "image_token_index": IMAGE,
        "projection_dim": 32,
        "hidden_size": 32,
    },
    "Gemma3": {
        "text_config": {**TEXT, "head_dim": 8},
        "vision_config": SIGLIP,
        "image_token_index": IMAGE,
        "boi_token_index": 311,
        "eoi_token_index": 312,
        "mm_tokens_per_image": 4,
    },
    "Mllama": {
        "text_config": {
            **TEXT,
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": ROPE,
            "rope_scaling": ROPE,
        },
        "vision_config": MLLAMA_TOWER,
        "image_token_index": IMAGE,
    },
}

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "Qwen3VLConfig"), reason="this transformers has not all of these models"
)


FORMS = {"words": {}, "paper": {"pairing": "rank", "router_scope": "prompt", "router_input": "hidden"}}
"""The default, and what a layer's own input decides."""


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def base(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for key, parameter in model.named_parameters():
        if re.search(r"cross_attn_\w+_gate|mm_input_projection_weight", key):  # zero at first: nothing would be seen
            torch.nn.init.uniform_(parameter.data, 0.2, 0.8)
    return model


def adapted(base, **options):
    return get_peft_model(base, MixLoraConfig(r=2, num_factors=4, task_type="CAUSAL_LM", **options))


def pictures_of(name, strength=1.0):
    """What each class wants beside the ids for a small and a larger picture, and how many placeholders each has."""
    g = torch.Generator().manual_seed(3)

    def pixels(*shape):
        return torch.randn(shape, generator=g) * strength

    if name == "LlavaNext":  # the first picture is one tile and an overview, the second two tiles and one
        given = pixels(2, 3, 3, 16, 16)
        given[0, 2] = 0
        return {"pixel_values": given, "image_sizes": torch.tensor([[16, 16], [16, 32]])}, (10, 14)
    if name == "LlavaOnevision":
        return {"pixel_values": pixels(2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16], [16, 16]])}, (10, 10)
    if name.startswith("Qwen"):
        grid = torch.tensor([[1, 2, 4], [1, 4, 4]])
        return {"pixel_values": pixels(24, 3 * 2 * 8 * 8), "image_grid_thw": grid}, (2, 4)
    if name in ("SmolVLM", "Idefics3"):
        mask = torch.ones(2, 1, 16, 16, dtype=torch.int64)
        return {"pixel_values": pixels(2, 1, 3, 16, 16), "pixel_attention_mask": mask}, (4, 4)
    if name == "Mllama":  # a tile and padding, and two tiles
        given = pixels(2, 1, 2, 3, 16, 16)
        given[0, 0, 1] = 0
        tiles = torch.tensor([[[1, 0]], [[1, 1]]])
        return {"pixel_values": given, "aspect_ratio_ids": torch.tensor([[1], [2]]), "aspect_ratio_mask": tiles}, (1, 1)
    return {"pixel_values": pixels(2, 3, 16, 16)}, (4, 4)


def batch_of(name, strength=1.0, rows=(0, 1), trains=True, left=True):
    """A padded batch of the `rows` of two questions with pictures, of different length."""
    given, counts = pictures_of(name, strength)
    start = [1, 312] if name.startswith("Qwen") else [1]
    words = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24, 25]]
    samples = [[*start, *[IMAGE] * counts[row], *words[row]] for row in rows]
    length = max(map(len, samples))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for row, sample in enumerate(samples):
        place = slice(length - len(sample), length) if left else slice(0, len(sample))
        ids[row, place], mask[row, place] = torch.tensor(sample), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("Qwen"):
        sizes = given["image_grid_thw"].prod(dim=1).tolist()
        parts = given["pixel_values"].split(sizes)
        batch["pixel_values"] = torch.cat([parts[row] for row in rows])
        batch["image_grid_thw"] = given["image_grid_thw"][list(rows)]
        if Version(transformers.__version__).major >= 5:  # before, the models find pictures themselves
            batch["mm_token_type_ids"] = (ids == IMAGE).long()
    else:
        batch.update({key: value[list(rows)] for key, value in given.items()})
    if name == "Mllama":
        batch["cross_attention_mask"] = mask[:, :, None, None] * batch["aspect_ratio_mask"][:, None]
    if name == "Gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if trains:
        answer = mask.flip(1).cumsum(dim=1).flip(1) <= 3
        batch["labels"] = ids.masked_fill((mask == 0) | ~answer, -100)
    if name == "PaliGemma":
        batch["token_type_ids"] = (batch["labels"] != -100).long() if trains else torch.zeros_like(ids)
    return batch


def test_every_linear_layer_of_the_language_model_is_adapted_and_no_other(base):
    expected = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"(language_model|text_model)\.(.*\.)?layers\.\d+\.", name)
        if not re.search(r"vision|visual", name)
    }
    assert len(expected) >= 14
    assert {name.removeprefix("base_model.model.") for name in layers(adapted(base))} == expected


def test_image_tokens_are_known(base):
    ids = torch.tensor([[5, IMAGE, IMAGE, 6, 7]])
    where, unknown = image_positions(base, {"input_ids": ids}, (1, 5))
    assert unknown is None and where.tolist() == [[False, True, True, False, False]]


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def step(model, batch):
    """Loss, gradients and what the routers of each layer said."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {key: each.grad.clone() for key, each in model.named_parameters() if "mixlora_" in key}
    scores = {key: layer.last_routes["default"].score_A.clone() for key, layer in layers(model).items()}
    return loss.detach(), gradients, scores


@pytest.mark.parametrize("form", FORMS)
def test_training_with_pictures_and_checkpoints(name, base, form):
    """Every layer learns, and is counted once a step, whoever's checkpoints run it again."""
    model = randomise(adapted(base, **FORMS[form]), scale=0.1).train()
    batch = batch_of(name)
    loss, gradients, scores = step(model, batch)
    assert all(gradient.abs().sum() > 0 for key, gradient in gradients.items() if "mixlora_A" in key)
    assert sum(gradient.abs().sum() > 0 for key, gradient in gradients.items() if "router" in key) > len(scores) / 2
    model.enable_input_require_grads()
    for number, reentrant in enumerate((False, True), start=2):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss_again, gradients_again, scores_again = step(model, batch)
        torch.testing.assert_close(loss_again, loss)
        torch.testing.assert_close(scores_again, scores)
        torch.testing.assert_close(gradients_again, gradients, rtol=1e-3, atol=1e-6)
        for layer in layers(model).values():
            assert layer.mixlora_stats_usage["default"].sum(dim=1).tolist() == [number * 2 * 2] * 2  # instances, r


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_batch_mates_and_padding_change_nothing(name, base, form, left):
    model = randomise(adapted(base, **FORMS[form]), scale=0.3).eval()
    both = batch_of(name, trains=False, left=left)
    for row in (0, 1):
        alone = batch_of(name, rows=(row,), trains=False)
        attended = both["attention_mask"][row].bool()
        difference = logits_of(model, both)[row, attended] - logits_of(model, alone)[0]
        with model.disable_adapter():
            usual = logits_of(model, both)[row, attended] - logits_of(model, alone)[0]
        assert difference.abs().max() <= 20 * usual.abs().max() + 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_generation(name, base, form):
    model = randomise(adapted(base, **FORMS[form]), scale=0.3).eval()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

    def answers(use_cache=True, **which):
        batch = batch_of(name, trains=False, **which)
        return model.generate(**batch, **options, use_cache=use_cache)[:, batch["input_ids"].shape[1] :]

    expected = answers()
    assert expected.shape == (2, 4)
    assert torch.equal(answers(use_cache=False), expected)
    assert all(torch.equal(answers(rows=(row,))[0], expected[row]) for row in (0, 1))


def scores_of(model, batch):
    logits_of(model, batch)
    return {key: layer.last_routes["default"].score_A.clone() for key, layer in layers(model).items()}


def test_an_instruction_is_routed_alike_whatever_its_picture_shows(name, base):
    """By words in all layers; by hidden states in the first, before attention has mixed text and picture."""

    def scores(**form):
        model = randomise(adapted(base, **form)).eval()
        seen = [scores_of(model, batch_of(name, strength, trains=False)) for strength in (1.0, 2.0)]
        return seen, model.unload()

    (one, other), _ = scores()
    assert all(torch.equal(one[key], other[key]) for key in one)
    first = next(key for key in one if "q_proj" in key)
    (one, other), _ = scores(router_input="hidden")
    assert torch.equal(one[first], other[first])
    (one, other), _ = scores(router_input="hidden", router_scope="prompt")
    sees = next(key for key in one if "cross_attn.k_proj" in key) if name == "Mllama" else first
    assert not torch.allclose(one[sees], other[sees])


def test_saving_and_merging(name, base, tmp_path):
    """The adapter is loaded by its file alone; where all factors are chosen, merging loses nothing."""
    model = randomise(adapted(base), scale=0.3).eval()
    batch = batch_of(name, trains=False)
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert not torch.equal(logits_of(base, batch), expected)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, batch), expected)
    whole = get_peft_model(loaded.unload(), MixLoraConfig(r=4, num_factors=4, task_type="CAUSAL_LM"))
    randomise(whole, scale=0.3).train()(**batch_of(name)).loss.backward()
    expected = logits_of(whole.eval(), batch)
    merged = whole.merge_and_unload()
    assert not layers(merged)
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Mllama"])
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_that_only_pads_the_batch_is_not_averaged(name, base, form):
    model = randomise(adapted(base, **FORMS[form]), scale=0.3).eval()
    batch = batch_of(name, rows=(1,), trains=False)
    expected, scores = logits_of(model, batch), scores_of(model, batch)
    for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        batch[key] = torch.cat([batch[key], torch.zeros_like(batch[key])], dim=1)
    batch["aspect_ratio_mask"][:, 1, 0] = 1  # as the processor marks it
    no_picture = torch.zeros_like(batch["cross_attention_mask"])
    batch["cross_attention_mask"] = torch.cat([batch["cross_attention_mask"], no_picture], dim=2)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores_of(model, batch), scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["Mllama"])
def test_the_picture_of_a_conversation_takes_its_first_questions_route(name, base):
    """As a cache keeps it that the first question has filled."""
    model = randomise(adapted(base)).train()
    batch = batch_of(name, rows=(0,))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][0, [5, 8]] = batch["input_ids"][0, [5, 8]]
    _, _, scores = step(model, batch)
    pictures = next(key for key in scores if "cross_attn.k_proj" in key)
    questions = next(key for key in scores if "cross_attn.q_proj" in key)
    assert scores[questions].shape == (2, 4) and scores[pictures].shape == (1, 4)
    router = layers(model)[questions].mixlora_router_A["default"].data
    layers(model)[pictures].mixlora_router_A["default"].data.copy_(router)
    model.eval()
    with known_prompt(answers=batch["labels"] != -100):
        scores = scores_of(model, batch)
    torch.testing.assert_close(scores[pictures][0], scores[questions][0])
    assert not torch.allclose(scores[pictures][0], scores[questions][1])


@pytest.mark.parametrize("name", ["Mllama"])
def test_a_conversation_about_a_picture_is_generated_alike_with_a_cache_and_without(name, base):
    model = randomise(adapted(base), scale=0.3).eval()
    batch = batch_of(name, trains=False)
    answers = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    answers[:, 4:6] = True
    options = {**batch, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with known_prompt(answers=answers):
        expected = model.generate(**options, use_cache=True)
        assert torch.equal(model.generate(**options, use_cache=False), expected)
