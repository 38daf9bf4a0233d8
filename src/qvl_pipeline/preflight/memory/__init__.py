"""Memory of a rank over an optimizer step, from the blocks of the model on the meta device."""
