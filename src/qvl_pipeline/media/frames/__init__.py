"""Frames of clips: which ones, decoding them, and the store that training reads."""
