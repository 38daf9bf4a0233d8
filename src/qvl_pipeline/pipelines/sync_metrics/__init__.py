"""Sends training metrics that the tracking server did not get."""
