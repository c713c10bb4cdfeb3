"""The embedded default: data, tiny models and studies that run on a laptop, from PyPI packages alone."""

from pathlib import Path

PLAYGROUND = Path(__file__).parent
"""Where `cache/` keeps data and base models, `output/` adapters, and `results/` the figures that are published."""
