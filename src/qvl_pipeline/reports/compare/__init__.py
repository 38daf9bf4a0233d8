"""Comparing trainings: tables, and the page that draws them."""
