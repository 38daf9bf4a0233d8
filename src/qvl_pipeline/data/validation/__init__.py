"""From `samples` to `valid_samples`: rules over rows and their media."""
