"""Time and memory, MixLoRA beside LoRA."""
