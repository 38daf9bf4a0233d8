"""What a training needs, before anything is loaded: memory, time, disk, and the smallest changes that make it fit."""
