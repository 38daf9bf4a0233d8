"""Pages of an evaluation: the report and the samples to browse."""
