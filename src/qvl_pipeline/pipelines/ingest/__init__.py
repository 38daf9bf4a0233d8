"""Stage `ingest`: every row of every source in one canonical table, or in the list of rejects."""
