"""Files of rows, read in small pieces with bounded memory: text, tables and shards, whatever is in them."""
