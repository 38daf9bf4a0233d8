"""Sweeps: many trainings of one profile that differ in some parameters, and which of them was the best."""
