"""The forms rows come in, and what each of them says: a conversation with its media, tools and weights."""
