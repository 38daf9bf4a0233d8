"""How well the preflight foretells memory: against torch's own accounting on a CPU, and against rows from a GPU.

`python -m benchmarks.preflight [--only cpu|gpu|profiles]`. On the CPU, tiny models of both families take real steps of
the engine (FSDP2 over gloo on up to four ranks) over a grid of settings, and every allocation is counted by torch's
profiler. The rows from one H200 are those that `benchmarks.gpu` left in `results/gpu_*.json`.
"""
