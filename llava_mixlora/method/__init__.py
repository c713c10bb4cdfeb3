"""MixLoRA as a PEFT method: mathematics, layer, tuner, registration. Imports nothing of LLaVA, nor another room."""
