"""Sound: decoding, spectrograms, and the store that training reads."""
