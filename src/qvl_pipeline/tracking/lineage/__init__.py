"""Where a run comes from: code, data, base model, environment."""
