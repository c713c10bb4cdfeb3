"""Benchmarks: questions, answers and scores."""
