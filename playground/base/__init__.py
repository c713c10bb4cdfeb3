"""The models of the embedded default: tokenizer, vision tower, a tiny LLaVA, and one around SmolLM2."""
