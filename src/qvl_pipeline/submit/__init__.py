"""A training as a job of a cluster: its description, rendered from the profile's parameters, and how it is sent."""
