"""A recorded run again, and what came out different."""
