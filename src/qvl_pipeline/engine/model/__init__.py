"""The model: built, loaded, computed with, exported."""
