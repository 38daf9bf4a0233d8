"""How well the preflight foretells memory and time: against torch's accounting, rows from a GPU, and a clock.

`python -m benchmarks.preflight [--only cpu|gpu|profiles|time]`. On the CPU, tiny models of both families take real
steps of the engine (FSDP2 over gloo on up to four ranks) over a grid of settings, and every allocation is counted by
torch's profiler. The rows from one H200 are those that `benchmarks.gpu` left in `results/gpu_*.json`. The time is that
of trainings of the embedded example, after one that is recorded.
"""
