"""Images and video: probing, sampling rules, decoding, frame store, patches."""
