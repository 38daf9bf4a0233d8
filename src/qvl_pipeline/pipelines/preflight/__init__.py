"""Says what a training needs before it starts; no stage."""
