"""Benchmarks: questions, answers and scores. Imports `inference` and the rooms below it."""
