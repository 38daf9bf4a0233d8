"""Repeats a recorded run and compares; no stage."""
