"""Profiles and their parameters: loaded, checked, made."""
