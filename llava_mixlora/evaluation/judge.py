"""A language model that decides whether answers are right, as the paper has Vicuna do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import MixLoraError
from ..writing import write_whole
from .json_lines import append_lines, read_lines
from .questions import Question

JUDGED = "judged.jsonl"
QUESTION = (
    "A question was asked about an image, and answered.\nQuestion: {prompt}\nRight answer: {target}\n"
    "Given answer: {answer}\nDoes the given answer mean the same as the right answer? Reply yes or no.\nReply:"
)


def judge_answers(
    name: str, questions: list[Question], answers: dict[str, dict[str, Any]], output: Path, batch_size: int
) -> dict[str, bool]:
    """By question id, whether a judge finds " yes" likelier than " no"; questions without a target are left out.

    Args:
        name: a causal language model, a folder or a hub name.
        questions: with their targets.
        answers: lines of `answers.jsonl` by question id.
        output: verdicts are kept there, in `judged.jsonl`; those of an interrupted run, by the same judge on the same
            answer, are not made again.
        batch_size: answers that are judged at a time.

    Raises:
        MixLoraError: the judge cannot be loaded.
    """
    keys = {q.id: [name, q.id, q.target, answers[q.id]["text"]] for q in questions if q.target is not None}
    known = {
        json.dumps(line["key"]): line["right"] for line in read_lines(output / JUDGED, {"key": list, "right": bool})
    }
    verdicts = {i: known[json.dumps(key)] for i, key in keys.items() if json.dumps(key) in known}
    pending = [question for question in questions if question.id in keys and question.id not in verdicts]
    if not pending:
        return verdicts
    tokenizer, model = _load(name)
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[-1] for word in (" yes", " no"))
    # Without the line that a killed process left torn; verdicts of other judges stay.
    write_whole(
        output / JUDGED, "".join(f'{{"key": {key}, "right": {json.dumps(right)}}}\n' for key, right in known.items())
    )
    for start in tqdm(range(0, len(pending), batch_size), desc="Judging", unit="batch"):
        batch = pending[start : start + batch_size]
        texts = [
            QUESTION.format(prompt=q.prompt, target=q.target, answer=answers[q.id]["text"] or "(nothing)")
            for q in batch
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            logits = model(**inputs).logits[:, -1]
        found = dict(zip((question.id for question in batch), (logits[:, yes] > logits[:, no]).tolist()))
        append_lines(output / JUDGED, [{"key": keys[identity], "right": right} for identity, right in found.items()])
        verdicts |= found
    return verdicts


def _load(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MixLoraError(f"--judge {name}: cannot be loaded ({reason}); expected a causal language model") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
