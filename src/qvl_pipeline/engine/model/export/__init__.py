"""The trained model as a plain transformers folder: the base model's files with other weights."""
