"""Sends to MLflow what it did not get of earlier runs: training metrics, scores, artifacts."""
