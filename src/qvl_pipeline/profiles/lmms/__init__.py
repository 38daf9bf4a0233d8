"""Configurations of LMMS Engine, and of its training guide, as profiles: every key has a counterpart, or a reason."""
