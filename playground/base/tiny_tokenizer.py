"""A Llama tokenizer whose vocabulary is the playground's own text.

It is a sentencepiece model of the kind Llama has (byte-pair merges, single digits, bytes for whatever else comes), so
LLaVA's preprocessing finds the same conventions: `<s>` in front, `</s>` read from the text as the end token, a space as
its own piece before a digit. With whole words as pieces, LLaVA's long system prompt costs 29 tokens.

    python -m playground.base.tiny_tokenizer --data data --output tokenizer
"""

import argparse
import io
import json
from pathlib import Path

from playground.atomic import atomic_directory, write_json
from playground.require import require

# An upper limit: merging ends sooner, when every word of the data is one piece (969 with 256 bytes and 3 controls).
VOCABULARY = 1024
MODEL_MAX_LENGTH = 2048

# Copies of `llava.conversation.conv_templates`, "llava_v1" and "v1" (their other words are LLaVA's too): importing
# llava takes seconds, and on transformers 5 needs the plugin's patches.
SYSTEM_PROMPTS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
)


def build(data_dir: Path, output_dir: Path) -> None:
    """Train the tokenizer on the text of ``data_dir`` and save it as the folder ``output_dir``.

    ``data_dir`` is what `playground.data.tasks` wrote. ``AutoTokenizer.from_pretrained(output_dir, use_fast=False)``
    gives a Llama tokenizer with `<unk>` 0, `<s>` 1, `</s>` 2, on transformers 4 (which reads ``tokenizer.model``) and
    on 5 (which derives its merges from it). Nothing is drawn at random: the same data give the same bytes.

    Raises:
        FileExistsError: ``output_dir`` holds something else than an earlier result.
    """
    with atomic_directory(output_dir, marker="tokenizer.model") as folder:
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(_sentences(Path(data_dir))))
        write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


# With ``legacy`` false, LLaVA's preprocess_v1 takes one token off each turn after the first. Here that is one too many
# (a turn's first word is one piece with or without its space), and it would drop the example as a mismatch.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "model_max_length": MODEL_MAX_LENGTH,
    "padding_side": "right",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
    "sp_model_kwargs": {},
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
}


def _sentences(data_dir: Path) -> list[str]:
    """The prompts and answers as LLaVA's v1 template joins them, and the system prompts."""
    sentences = []
    for name in ("train.json", "describe.json"):
        for example in json.loads((data_dir / name).read_text(encoding="utf-8")):
            prompt, answer = (turn["value"].removeprefix("<image>\n") for turn in example["conversations"])
            # LLaVA's prompt follows a line break, without a space. The full stop stands for it here: a line break would
            # become a piece, where Llama has a byte.
            sentences.append(f"USER: .{prompt} ASSISTANT: {answer}")
    # As often as each stands in front of the data, so their words become whole pieces as well.
    return [*sentences, *(SYSTEM_PROMPTS * (len(sentences) // 2))]


def _sentencepiece_model(sentences: list[str]) -> bytes:
    sentencepiece = require("sentencepiece", "sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        # As Llama's: text is taken as it stands, blanks included.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    """Command line: train the tokenizer on a folder that `playground.data.tasks` wrote."""
    parser = argparse.ArgumentParser(description="Train the playground's small Llama tokenizer.")
    parser.add_argument("--data", type=Path, required=True, help="folder that playground.data.tasks wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; an earlier result is replaced")
    arguments = parser.parse_args()
    try:
        build(arguments.data, arguments.output)
    except (FileExistsError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
