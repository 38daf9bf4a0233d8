"""Parameters of a training: batches, optimisation, adapters, recomputation, processes."""
