"""Tiny random models, built once per session; no test downloads anything."""

import copy
import json
import os
import shutil

# Before any library reads it: what is named by a hub name is not there, which is found out at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_mixlora import llava_package, patches

from .tiny import VOCABULARY

if "PYTEST_XDIST_WORKER" in os.environ:
    # Coverage is of what the tests' own processes run. In the programs that tests start, it makes imports, which are
    # most of what these do, take two thirds longer.
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)

torch.set_num_threads(1)  # more of them cost tiny models more than they gain

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits far enough apart for greedy decoding to be a test
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# For 4-bit weights in use: on processors with bfloat16 instructions bitsandbytes packs rows of 32 and columns of 64.
PACKABLE_LLAMA = {**LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _llama():
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **LLAMA)).eval()


@pytest.fixture
def llama(_llama):
    """A fresh copy of a random Llama: hidden size 32, two layers."""
    return copy.deepcopy(_llama)


@pytest.fixture(scope="session")
def llama_folder(_llama, tmp_path_factory):
    """The random Llama as a checkpoint."""
    folder = tmp_path_factory.mktemp("llama")
    _llama.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def same_llava():
    """Programs that a test runs in this process, and adapters that it loads, say which LLaVA is used: until its end."""
    before = llava_package.used()
    yield
    llava_package.use(before)


@pytest.fixture(scope="session")
def patched():
    """The plugin's patches, applied for the rest of the session: without them llava cannot be imported."""
    patches.apply()
    return patches


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP tower with four patches, as `--vision_tower` names it."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 16, "width": 16},
        "size": {"shortest_edge": 16},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A sentencepiece Llama tokenizer that knows its bytes and few words.

    Before transformers 5 it drops spaces at the end of a text, as sentencepiece does unless it is told.
    """
    return _train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def exact_tokenizer_folder(tmp_path_factory):
    """One that takes text as it stands, as Llama's own does."""
    as_it_stands = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return _train_tokenizer(tmp_path_factory.mktemp("exact_tokenizer"), **as_it_stands)


def _train_tokenizer(folder, **normalization):
    import sentencepiece

    words = ["what color is the shape", "red green blue circle square", "a chat between a human and an assistant"]
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words * 50),
            model_writer=model,
            model_type="bpe",
            vocab_size=320,
            hard_vocab_limit=False,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
            **normalization,
        )
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    config = {"tokenizer_class": "LlamaTokenizer", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": True, "model_max_length": 256}))
    return folder


@pytest.fixture(scope="session")
def _llava(patched, clip_folder):
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    torch.manual_seed(3)
    config = LlavaConfig(
        vocab_size=VOCABULARY,
        mm_vision_tower=str(clip_folder),
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=16,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        use_mm_proj=True,
        pretraining_tp=1,
        **LLAMA,
    )
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    return model.eval()


@pytest.fixture(scope="session")
def llava_folder(_llava, tokenizer_folder, tmp_path_factory):
    """The tiny LLaVA as a checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("llava-base")
    _llava.save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def llava(_llava):
    """A fresh copy of a random upstream LLaVA: the Llama's size, a tiny CLIP tower, an MLP projector."""
    return copy.deepcopy(_llava)


@pytest.fixture
def copy_of():
    """Makes another fresh copy of a session's model."""
    return copy.deepcopy
