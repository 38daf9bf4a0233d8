"""What a rank trains on, step by step: samples, packs, batches."""
