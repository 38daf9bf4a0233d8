"""Parameters of the stages that make a dataset: sources, rules, frames, and the engine under them."""
