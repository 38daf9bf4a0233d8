"""Attention over packs, of both kinds: which tokens of a row see each other, and by which kernel."""
