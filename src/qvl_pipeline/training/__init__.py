"""The parent's side of a training: what it is, where it works, how it starts, runs and is published."""
