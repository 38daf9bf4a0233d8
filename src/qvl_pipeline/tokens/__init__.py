"""From a conversation and the sizes of its media to token ids: for the tokenised table and for a stream alike."""
