"""A LLaVA in memory, ready to be asked or to be measured on data. Imports `patches` and the rooms below it."""
