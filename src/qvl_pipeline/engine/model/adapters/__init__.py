"""Low-rank adapters of a frozen model, ours in the making and peft's on disk."""

# Below the exported model. An `adapter_config.json` beside merged weights would be applied to them once more.
FOLDER = "adapter"
