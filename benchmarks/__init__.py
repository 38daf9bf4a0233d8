"""Benchmarks: `python -m benchmarks.<name>` prints one table and writes `benchmarks/results/<name>.json`."""
