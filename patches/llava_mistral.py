"""`llava.model.language_model.llava_mistral`: what `llava_llama` needs, for its twin."""

from __future__ import annotations

from dataclasses import replace

from . import llava_llama

LLAMA, MISTRAL = "llava_llama:LlavaLlamaForCausalLM", "llava_mistral:LlavaMistralForCausalLM"

PATCHES = tuple(replace(patch, target=patch.target.replace(LLAMA, MISTRAL)) for patch in llava_llama.PATCHES)
