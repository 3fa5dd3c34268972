"""Benchmarks against peers, run from a checkout: `python -m benchmarks.peers`."""
