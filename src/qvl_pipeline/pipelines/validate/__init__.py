"""Stage `validate`: every sample against every rule; what is unusable goes to quarantine with its reason."""
