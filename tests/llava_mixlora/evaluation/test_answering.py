"""Prompts are those of training, also by templates that ask a tokenizer for them; by small stand-ins."""

from types import SimpleNamespace

import pytest
import torch

from llava_mixlora.evaluation import answering

pytestmark = pytest.mark.one_stack
BEGIN = 1
TOKENIZER = SimpleNamespace(bos_token_id=BEGIN, begins="<begin>")


class Template:
    """Of a fork: it asks a tokenizer how a prompt begins, and loses it in a copy."""

    roles = ("user", "assistant")

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer

    def copy(self):
        return Template()

    def append_message(self, role, text):
        self.text = text or self.text

    def get_prompt(self):
        return self.tokenizer.begins + self.text


class Plain(Template):
    """As LLaVA's own, which know no tokenizer."""

    def __init__(self):
        pass

    def copy(self):
        return Plain()

    def get_prompt(self):
        return self.text


def tokenize(prompt, tokenizer, image, return_tensors):
    return torch.tensor([BEGIN, *([BEGIN] if prompt.startswith("<begin>") else []), image, 7])


@pytest.mark.parametrize("template", [Template, Plain])
def test_prompt_begins_once(monkeypatch, template):
    constants = SimpleNamespace(DEFAULT_IMAGE_TOKEN="<image>", IMAGE_TOKEN_INDEX=-200)
    parts = {answering.TEMPLATES: {"of_it": template()}, "llava.constants": constants}
    monkeypatch.setattr(answering, "part", {**parts, "llava.mm_utils:tokenizer_image_token": tokenize}.__getitem__)
    loaded = TOKENIZER, SimpleNamespace(config=SimpleNamespace()), None
    assert answering._prompt_ids("Why?", "of_it", loaded).tolist() == [BEGIN, -200, 7]
