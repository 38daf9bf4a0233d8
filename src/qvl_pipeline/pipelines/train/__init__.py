"""Stage `train`: execute the pack plan with torchrun and export the model."""
