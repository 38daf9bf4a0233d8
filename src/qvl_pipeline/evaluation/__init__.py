"""Answers of a model on the eval split, and how right they are."""
