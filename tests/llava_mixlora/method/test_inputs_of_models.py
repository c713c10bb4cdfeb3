"""Models whose adapted layers get something else than the sequence: rows, one per instance, images, experts' tokens."""

import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

from ...tiny import VOCABULARY, layers, message_of, paper_form, random_ids, randomise

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
IDS = random_ids(2, 7)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
RIGHT = LEFT.flip(1)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1}
LLAMA = {**LLAMA, "eos_token_id": 2, "max_position_embeddings": 256}
recent = pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="written for models of transformers 5")


def adapt(model, targets, **options):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "target_modules": targets, **options}
    return randomise(get_peft_model(model, paper_form(**options)), scale=0.3).eval()


def opt():
    return OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.3)
    )


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=48, initializer_range=0.3))


def llama_classifier():
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3))


# --- rows of [B * S, d], and [B, d]


@pytest.mark.parametrize("mask, alone", [(LEFT, slice(2, 7)), (RIGHT, slice(0, 5))], ids=["left", "right"])
def test_layers_that_get_all_positions_as_rows_route_each_instance_by_its_own(mask, alone):
    model = adapt(opt(), ["q_proj", "fc1", "fc2"])
    logits = model(input_ids=IDS, attention_mask=mask).logits[0, alone]
    torch.testing.assert_close(logits, model(input_ids=IDS[:1, alone]).logits[0], **CLOSE)
    routes = model.base_model.routes()
    assert {len(route.index_A) for route in routes.values()} == {1}
    model(input_ids=IDS, attention_mask=mask)
    assert {len(route.index_A) for route in model.base_model.routes().values()} == {2}


def test_layers_that_get_rows_keep_their_routes_in_generation():
    model = adapt(opt(), ["q_proj", "fc1", "fc2"])
    options = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


@pytest.mark.parametrize(
    "model_of, mask, alone, targets",
    [
        (bert, RIGHT, slice(0, 5), ["query", "value", "dense", "classifier"]),
        (llama_classifier, LEFT, slice(2, 7), ["q_proj", "down_proj", "score"]),
        (llama_classifier, RIGHT, slice(0, 5), ["q_proj", "down_proj", "score"]),
    ],
    ids=["BERT", "Llama, left", "Llama, right"],
)
def test_classifier_sees_an_instance_as_if_it_were_alone(model_of, mask, alone, targets):
    model = adapt(model_of(), targets)
    together = model(input_ids=IDS * mask, attention_mask=mask).logits
    torch.testing.assert_close(together[0], model(input_ids=IDS[:1, alone]).logits[0], **CLOSE)
    torch.testing.assert_close(together[1], model(input_ids=IDS[1:]).logits[0], **CLOSE)
    assert any(name.endswith(("classifier", "score")) for name in layers(model))


@pytest.mark.filterwarnings("ignore:MixLoRA's routers")
@pytest.mark.parametrize(
    "model_of, targets", [(bert, ["query", "dense", "classifier"]), (llama_classifier, ["q_proj", "score"])]
)
def test_classifier_trains_every_layer(model_of, targets):
    model = adapt(model_of(), targets).train()
    model(input_ids=IDS, attention_mask=RIGHT, labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    for layer in layers(model).values():
        assert layer.mixlora_stats_usage["default"].sum() == 2 * 2 * 2  # instances, pools, r


# --- rows of which nobody tells to which instance they belong


class Mixture(nn.Module):
    """Two experts, each of which gets the tokens that chose it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gate = inner, nn.Linear(32, 2)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, y = self.gate(flat).argmax(dim=-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = expert(flat[chosen == number])
        return self.inner(x) + y.view(x.shape)


def mixture_of_experts():
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    for layer in model.model.layers:
        layer.mlp = Mixture(layer.mlp)
    return model


def test_experts_are_refused_and_everything_beside_them_works():
    message = message_of(adapt(mixture_of_experts(), r".*(q_proj|experts\.\d)"), input_ids=IDS)
    assert "rows in a forward pass of 2 x 7 positions" in message and "exclude_modules" in message
    model = adapt(mixture_of_experts(), r".*(q_proj|gate|experts\.\d)", exclude_modules=r".*experts\.\d")
    assert len(layers(model)) == 4
    together = model(input_ids=IDS, attention_mask=LEFT).logits[0, 2:]
    torch.testing.assert_close(together, model(input_ids=IDS[:1, 2:]).logits[0], **CLOSE)


@pytest.mark.parametrize("rows", [2, 14], ids=["as many as instances", "as many as positions"])
def test_experts_are_refused_by_any_number_of_tokens(rows):
    model = mixture_of_experts()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # which leaves all of the tokens to the expert of the bias
        layer.mlp.gate.bias.data.copy_(torch.tensor([1.0, 0.0]))
    ids = IDS if rows == 14 else IDS[:, :1]
    assert f"gets {rows} rows" in message_of(adapt(model, r".*experts\.\d"), input_ids=ids)


# --- vision-language models of transformers, adapted as the paper adapts LLaVA

IMAGE, VIDEO, BEGIN, END = 310, 311, 312, 313
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
IDS_OF_IMAGES = {"image_token_id": IMAGE, "image_token_index": IMAGE}
LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
LANGUAGE_MODEL = rf".*(language_model|text_model).*\.({LINEAR})"


def with_image(tokens, length=14, begin=2):
    ids = random_ids(2, length) % 300 + 3
    ids[:, begin : begin + tokens] = IMAGE
    return ids


def llava():
    vision = {"model_type": "clip_vision_model", "patch_size": 8, **TOWER}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **LLAMA}, **IDS_OF_IMAGES
    )
    inputs = {"input_ids": with_image(4), "pixel_values": torch.randn(2, 3, 16, 16)}
    return transformers.LlavaForConditionalGeneration(config), inputs


def llava_onevision():
    vision = {"model_type": "siglip_vision_model", "patch_size": 8, **TOWER}
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **LLAMA},
        video_token_id=VIDEO,
        image_grid_pinpoints=[[16, 16], [16, 32]],
        vision_feature_layer=-1,
        **IDS_OF_IMAGES,
    )
    pictures = {"pixel_values": torch.randn(2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)}
    return transformers.LlavaOnevisionForConditionalGeneration(config), {"input_ids": with_image(10, 20), **pictures}


def qwen(kind, vision):
    text = {**LLAMA, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    special = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, **vision}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, vision_end_token_id=END, pad_token_id=0, **special
    )
    ids = with_image(4, 16)
    ids[:, 1], ids[:, 6] = BEGIN, END
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long()}
    pictures = {"pixel_values": torch.randn(2 * 16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), {**inputs, **pictures}


def qwen2_vl():
    return qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2})


def qwen2_5_vl():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    return qwen("Qwen2_5_VL", {**sizes, "window_size": 16, "fullatt_block_indexes": [1]})


def idefics3():
    config = transformers.Idefics3Config(
        vision_config={"patch_size": 4, **TOWER},
        text_config={"model_type": "llama", **LLAMA},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    inputs = {"input_ids": with_image(4), "pixel_values": torch.randn(2, 1, 3, 16, 16)}
    return transformers.Idefics3ForConditionalGeneration(config), inputs


def gemma3():
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        vision_config={"patch_size": 8, "vision_use_head": False, **TOWER},
        text_config={**LLAMA, "head_dim": 8, "sliding_window": 6, "layer_types": kinds},
        mm_tokens_per_image=4,
        pad_token_id=0,
        **IDS_OF_IMAGES,
    )
    ids = with_image(4)
    inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    return transformers.Gemma3ForConditionalGeneration(config), inputs


def padded(inputs, left):
    """Three positions of padding at one side of both rows."""
    ids = inputs["input_ids"]
    sequences = {**inputs, "attention_mask": torch.ones_like(ids)}
    sides = (3, 0) if left else (0, 3)
    return {k: nn.functional.pad(v, sides) if v.shape == ids.shape else v for k, v in sequences.items()}


VISION_LANGUAGE_MODELS = [llava, llava_onevision, qwen2_vl, qwen2_5_vl, idefics3, gemma3]
INSTRUCTION = {"pairing": "same", "router_scope": "instruction"}
WORDS = {**INSTRUCTION, "router_input": "words"}


@recent
@pytest.mark.parametrize("form", [{}, INSTRUCTION, WORDS], ids=["default", "instruction", "words"])
@pytest.mark.parametrize("model_of", VISION_LANGUAGE_MODELS)
def test_vision_language_model_of_transformers(model_of, form):
    base, inputs = model_of()
    model = adapt(base.eval(), LANGUAGE_MODEL, **form)
    assert len(layers(model)) == 2 * 7
    with torch.no_grad():
        logits = model(**inputs).logits
        for left, own in ((True, slice(3, None)), (False, slice(0, -3))):
            torch.testing.assert_close(model(**padded(inputs, left)).logits[:, own], logits, **CLOSE)

    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokens = model.generate(**padded(inputs, left=True), **options)
    assert torch.equal(model.generate(**padded(inputs, left=True), **options, use_cache=False), tokens)
    assert torch.equal(model.generate(**inputs, **options)[:, -5:], tokens[:, -5:])

    step = padded(inputs, left=False)
    asked = torch.arange(step["input_ids"].shape[1]) < inputs["input_ids"].shape[1] - 4
    step["labels"] = step["input_ids"].masked_fill(asked | (step["attention_mask"] == 0), -100)

    def gradients():
        model.train().zero_grad()
        if form is WORDS:
            model.get_base_model().mixlora_stats_words["default"].zero_()  # centres alike each time
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="MixLoRA")
            model(**step).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients()
    kinds = 3 if form else 5  # no router B, no W_AB
    assert len(expected) == 2 * 7 * kinds and all(gradient is not None for gradient in expected.values())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name])


@recent
@pytest.mark.parametrize("model_of", [qwen2_vl, qwen2_5_vl])
def test_tower_that_merges_patches_of_several_images_is_refused(model_of):
    base, inputs = model_of()
    message = message_of(adapt(base.eval(), r".*visual\.merger\.mlp\.[02]"), **inputs)
    assert "gets 8 rows in a forward pass of 2 x 16 positions" in message and "exclude_modules" in message


@recent
@pytest.mark.parametrize("model_of", VISION_LANGUAGE_MODELS)
def test_instruction_of_a_vision_language_model_is_its_text(model_of):
    """Other pictures change no route by words, and other words do."""
    base, inputs = model_of()
    model = adapt(base.eval(), LANGUAGE_MODEL, **WORDS)

    def scores(**changed):
        with torch.no_grad():
            model(**{**inputs, **changed})
        return torch.stack([route.score_A for route in model.base_model.routes().values()])

    expected = scores()
    pixels = {name: value.flip(0) for name, value in inputs.items() if name.startswith("pixel_values")}
    assert pixels and torch.equal(scores(**pixels), expected)
    first = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO, BEGIN, END])).logical_not().nonzero()[-1]
    other = inputs["input_ids"].clone()
    other[tuple(first)] = (other[tuple(first)] + 1) % 100 + 3
    assert not torch.allclose(scores(input_ids=other), expected)


@recent
def test_pictures_of_a_model_that_names_no_image_token_are_told():
    base, inputs = llava()
    model = adapt(base.eval(), LANGUAGE_MODEL, **INSTRUCTION)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(inputs["input_ids"])
    message = message_of(model, inputs_embeds=embedded)
    assert "LlavaForConditionalGeneration is given inputs_embeds" in message and "router_scope='prompt'" in message
