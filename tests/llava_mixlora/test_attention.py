"""What MixLoRA computes does not depend on how attention is computed, padding included."""

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import LlamaForCausalLM

from llava_mixlora.adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL

from ..tiny import LINEAR_LAYERS, paper_form, random_ids, randomise

STAND_IN = "attention_without_padding"
HAS_INTERFACE = hasattr(transformers, "AttentionInterface") and hasattr(transformers, "AttentionMaskInterface")
needs_interface = pytest.mark.skipif(not HAS_INTERFACE, reason="these transformers take no attention of others")
OTHERS = ["sdpa", pytest.param(STAND_IN, marks=needs_interface)]
IMAGE = -200
PATCHES = 4  # of a picture of the tiny tower


def attend(module, query, key, value, attention_mask, scaling=None, **unused):
    """Attention as flash-attn computes it: each sequence without its padding, from a mask [B, T] or none.

    query: [B, H, S, d], key and value: [B, H', T, d]; the S positions are the last of the T.
    """
    attend.masks.add(None if attention_mask is None else attention_mask.ndim)
    batch, heads, length, _ = query.shape
    total = key.shape[2]
    output = query.new_zeros(batch, length, heads, value.shape[-1])
    for row in range(batch):
        kept = torch.ones(total, dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        asking = kept[total - length :]
        q, k, v = query[row][:, asking], key[row][:, kept], value[row][:, kept]
        k, v = (states.repeat_interleave(heads // len(states), dim=0) for states in (k, v))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = (q @ k.transpose(1, 2) * scaling).masked_fill(~sees, -torch.inf)
        output[row, asking] = (scores.softmax(dim=-1) @ v).transpose(0, 1)
    return output, None


def two_dimensional_mask(attention_mask=None, **unused):
    """What transformers hands down for flash attention: the mask [B, T] itself, or none where nothing is padded."""
    return None if attention_mask is None or attention_mask.all() else attention_mask


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    if HAS_INTERFACE:
        transformers.AttentionInterface.register(STAND_IN, attend)
        transformers.AttentionMaskInterface.register(STAND_IN, two_dimensional_mask)


@pytest.fixture
def masks():
    """The dimensions of the masks that the stand-in has got, None for no mask."""
    attend.masks = set()
    return attend.masks


def adapted(model, **options):
    options = {"target_modules": LINEAR_LAYERS, "task_type": "CAUSAL_LM", **options}
    config = paper_form(r=2, num_factors=6, lora_alpha=8, **options)
    return randomise(get_peft_model(model, config)).eval()


@pytest.fixture
def llama_with(llama_folder):
    return lambda attention: adapted(LlamaForCausalLM.from_pretrained(llama_folder, attn_implementation=attention))


@pytest.fixture
def llava_with(llava_folder, patched):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    def llava_with(attention, side):
        model = LlavaLlamaForCausalLM.from_pretrained(llava_folder, attn_implementation=attention)
        model.get_vision_tower().load_model()
        model.config.tokenizer_padding_side = side
        return adapted(model, exclude_modules=NOT_THE_LANGUAGE_MODEL)

    return llava_with


def padded(rows, side):
    """Ids [B, S] of prompts that differ in length, and their mask; 0 where padded."""
    longest = max(map(len, rows))
    fill = [torch.zeros(longest - len(row), dtype=torch.long) for row in rows]
    joined = [torch.cat([f, r] if side == "left" else [r, f]) for f, r in zip(fill, rows)]
    ids = torch.stack(joined)
    return ids, (ids != 0).long()


def rows_of_ids(lengths):
    return [random_ids(length, seed=length) for length in lengths]


def rows_with_images():
    rows = rows_of_ids([4, 9, 6])
    for row in rows:
        row[1] = IMAGE
    return rows


def compare(reference, other, attended):
    """Outputs and routes of two models that have run on the same inputs."""
    for logits, expected, positions in zip(other[0], reference[0], attended):
        assert (logits[positions] - expected[positions]).abs().max() < 1e-5
    assert reference[1].keys() == other[1].keys() and len(reference[1]) == 14
    for name, routes in reference[1].items():
        for of_a_pool, expected in zip(other[1][name], routes):
            # The choices are the same; the probabilities round.
            assert torch.allclose(of_a_pool, expected, atol=1e-5 if expected.is_floating_point() else 0, rtol=0), name


def run(model, **inputs):
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits, {name: tuple(routes) for name, routes in model.base_model.routes().items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", OTHERS)
def test_llama_is_the_same_for_every_attention(llama_with, masks, attention, side):
    ids, mask = padded(rows_of_ids([3, 11, 7]), side)
    eager, other = llama_with("eager"), llama_with(attention)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if side == "left":  # as generate() numbers them; attention sees only how far apart positions are
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    compare(run(eager, **inputs), run(other, **inputs), mask.bool())
    assert masks == ({2} if attention == STAND_IN else set())


@pytest.mark.parametrize("attention", OTHERS)
def test_gradients_are_the_same_for_every_attention(llama_with, attention):
    ids, mask = padded(rows_of_ids([3, 11, 7]), "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    gradients = []
    for model in (llama_with("eager"), llama_with(attention)):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("router" in name for name in gradients[0])
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", OTHERS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_llama_generates_the_same_tokens_for_every_attention(llama_with, attention, use_cache):
    ids, mask = padded(rows_of_ids([3, 11, 7]), "left")
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "use_cache": use_cache}
    eager, other = (
        llama_with(name).generate(input_ids=ids, attention_mask=mask, **options) for name in ("eager", attention)
    )
    assert eager.shape[1] == ids.shape[1] + 8 and torch.equal(eager, other)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", OTHERS)
def test_llava_with_images_is_the_same_for_every_attention(llava_with, masks, attention, side):
    rows = rows_with_images()
    ids, mask = padded(rows, "right")  # as LLaVA's collator pads; the side on which LLaVA pads again is the model's
    inputs = {"input_ids": ids, "attention_mask": mask, "images": torch.randn(len(rows), 3, 16, 16)}
    eager, other = (run(llava_with(name, side), **inputs) for name in ("eager", attention))
    lengths = [len(row) - 1 + PATCHES for row in rows]
    attended = torch.zeros(eager[0].shape[:2], dtype=torch.bool)
    for row, length in enumerate(lengths):
        attended[row, -length:] = side == "left"
        attended[row, :length] |= side == "right"
    compare(eager, other, attended)
    assert masks == ({2} if attention == STAND_IN else set())


@pytest.mark.parametrize("attention", OTHERS)
def test_llava_generates_the_same_tokens_for_every_attention(llava_with, attention):
    rows = rows_with_images()
    ids, mask = padded(rows, "right")
    images = torch.randn(len(rows), 3, 16, 16)
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "attention_mask": mask}
    eager, other = (llava_with(name, "left").generate(ids, images=images, **options) for name in ("eager", attention))
    assert eager.shape[1] >= 8 and torch.equal(eager, other)  # transformers 4.37 adds one
