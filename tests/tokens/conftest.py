"""Base models and processors as the data stages have them."""

from tests.data.conftest import base_model, model, processor

__all__ = ["base_model", "model", "processor"]
