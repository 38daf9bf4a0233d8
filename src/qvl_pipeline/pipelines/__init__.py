"""The stages, one package each: `pipeline.py` wires, `nodes.py` adapts catalog entries to the rooms below."""
