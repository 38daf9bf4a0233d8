"""Runs in MLflow: started, filled, ended, read again."""
