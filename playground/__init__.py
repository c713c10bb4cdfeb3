"""The embedded default: data, tiny models and studies that run on a laptop, from PyPI packages alone."""
