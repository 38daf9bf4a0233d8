"""Compares trainings on one page."""
