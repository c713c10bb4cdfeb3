"""How large what is read may be: far above what anybody has, and far below what fills a memory or never ends."""

from __future__ import annotations

JSON_BYTES = 64 << 20
"""Of a JSON file that describes something; the state of a training run with 100,000 logged steps has 20 MB."""
JSON_DEPTH = 64
"""How deep its lists and objects may be nested."""
NUM_FACTORS = 4096
"""Factors in a pool. An instance's core has as many rows and columns, so this many take 64 MB in each layer."""
TASKS = 65_536
"""Names of tasks that an adapter may have."""
PATTERN_LETTERS = 4096
"""Of a regular expression over names of layers."""
PATTERN_BITS = 20
"""Of such an expression: at worst a name is matched in about 2 to the power of it steps, which take a hundredth of a
second (see `method.patterns`)."""
HEADER_TENSORS = 1_000_000
"""Tensors in one file."""
PICKLE_OPERATIONS = 20_000_000
"""Steps of a pickle that are looked through for code."""
