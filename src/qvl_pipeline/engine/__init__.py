"""The trainer. Plain torch and transformers; files in, files out: `python -m qvl_pipeline.engine <train_spec.json>`."""
