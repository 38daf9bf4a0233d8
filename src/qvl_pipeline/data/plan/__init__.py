"""From samples to tokens, packs and steps."""
