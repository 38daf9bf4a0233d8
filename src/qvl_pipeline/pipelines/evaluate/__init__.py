"""Stage `evaluate`: answers of the base and the trained model on the eval split, their score, and the report."""
