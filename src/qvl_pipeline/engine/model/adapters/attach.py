"""An adapter on disk put on a plain model, which then answers with it or without it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from qvl_pipeline.engine.model.adapters.adapted import adapted_layers
from qvl_pipeline.engine.model.adapters.files import read_adapter
from qvl_pipeline.engine.model.adapters.form import Form, scaling_of
from qvl_pipeline.engine.model.adapters.injection import adapt, enable
from qvl_pipeline.engine.model.adapters.linear import row_lengths_of


class AttachedAdapter:
    """An adapter on a model. Switched off, the model is its base, bit for bit."""

    def __init__(self, model: PreTrainedModel, folder: str | Path) -> None:
        """Put an adapter in peft's format on a model; it is switched on.

        Args:
            model: The base model, with its weights.
            folder: Folder of the adapter.

        Raises:
            ValueError: It cannot be read, or is not of this model.
        """
        stored = read_adapter(folder)
        parameters = dict(model.named_parameters())
        weights = {name if name in stored.experts else f"{name}.weight" for name in stored.layers}
        if foreign := sorted(weights.union(stored.fully).difference(parameters)):
            raise ValueError(f"the adapter {folder} has '{foreign[0]}', which its base model has not")
        scaling = scaling_of(stored.alpha, stored.r, rslora=stored.rslora)
        adapt(model, stored.layers, Form(stored.r, scaling, dora=stored.dora))
        with torch.no_grad():
            for name, layer in adapted_layers(model):
                for own, values in stored.layers[name].items():
                    parameter = getattr(layer, own)
                    lengths = row_lengths_of(layer.weight) if own == "lora_magnitude" else 0
                    parameter.copy_(values.to(parameter.device) - lengths)
        self._model, self._on = model, True
        # Those trained in full take the place of the base model's, which are kept.
        self._fully = [(parameters[name], values) for name, values in stored.fully.items()]
        self._exchange()

    def switch(self, *, on: bool) -> None:
        """Let the model answer with the adapter, or as its base."""
        if on != self._on:
            self._on = on
            enable(self._model, on)
            self._exchange()

    def _exchange(self) -> None:
        exchanged = []
        for parameter, other in self._fully:
            own = parameter.data
            parameter.data = other.to(own.device, own.dtype)
            exchanged.append((parameter, own))
        self._fully = exchanged
