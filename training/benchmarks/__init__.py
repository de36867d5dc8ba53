"""Benchmarks: `benchmark.py` is the command."""
