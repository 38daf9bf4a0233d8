"""Scores of benchmarks that people quote, equal to those of the published scripts."""
