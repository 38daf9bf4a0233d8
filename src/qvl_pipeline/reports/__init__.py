"""What is shown: pages, plots, pictures."""
