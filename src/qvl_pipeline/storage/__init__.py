"""What lies on disk: whether it is what was written, and whether there is room for more."""
