"""From a declared dataset and profile to a trained, evaluated, exported Qwen2.5-VL or Qwen3-VL model."""

__version__ = "0.1.0"
