"""How a tokenizer takes the turns of a conversation."""

from __future__ import annotations

from typing import Any

TURN = "USER: Why?"


def counts_turns_alone(tokenizer: Any) -> bool:
    """Whether a turn after another's end token has as many tokens as alone, which Llama's `legacy` tokenizers say.

    Others put a space before a text that begins the input, and none behind the end token. Upstream's `preprocess_v1`
    counts each turn alone, and takes one token off where the tokenizer is none of the `legacy` ones.
    """
    alone = tokenizer(TURN, add_special_tokens=False).input_ids
    ids = tokenizer(tokenizer.eos_token + TURN, add_special_tokens=False).input_ids
    return len(ids) - ids.index(tokenizer.eos_token_id) - 1 == len(alone)
