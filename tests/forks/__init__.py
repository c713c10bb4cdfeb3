"""Forks of LLaVA by their own code, where an environment has it; `scripts/test_stacks.sh` makes one."""
