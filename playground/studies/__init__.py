"""Experiments whose figures are published in `results/`."""
