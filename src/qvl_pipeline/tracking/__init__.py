"""What is kept about a run for people: experiment tracking and the report."""
