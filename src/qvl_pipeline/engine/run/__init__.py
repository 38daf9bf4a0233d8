"""What a run does beside training: checkpoints, metrics, evaluations, and how it is watched and stopped."""
