"""Trainers other than LLaVA's on transformers' own LLaVA, as short programs to read: TRL's, and Trainer with FSDP2."""
