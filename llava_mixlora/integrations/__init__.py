"""MixLoRA in other training frameworks: a module for each, which needs its framework; nothing else imports one."""
