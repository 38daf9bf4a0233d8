"""Low-rank adapters of a frozen model, ours in the making and peft's on disk."""
