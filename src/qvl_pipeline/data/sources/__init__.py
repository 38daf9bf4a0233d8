"""From what people have to `samples`: file types, forms of rows, media, remote files."""
