"""Upstream's LLaVA as transformers' own `LlavaForConditionalGeneration`, and adapters of either for the other."""
