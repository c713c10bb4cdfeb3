"""A LLaVA in memory, asked or measured on data. Imports `patches`, which loading applies, and what is below."""
