"""The embedded demonstration: a dataset of real handwritten digits, and tiny Qwen-VL models that learn it on a CPU."""
