"""The weights of a trained model, one by one and whole: what was trained from its shards, the rest from the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvl_pipeline.engine.model.adapters.adapted import adapted_weights, base_sizes
from qvl_pipeline.engine.model.adapters.merging import merged
from qvl_pipeline.engine.model.adapters.values import gathered, gathered_adapter
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.weight_files import StoredWeights


class WholeWeights:
    """Weights as published checkpoints have them, under the names of the module, adapters merged.

    Those that published checkpoints have beside the model are among them, and kept as they are.

    Frozen weights are those of the base model's files, bit for bit: in the model they may be rounded to the type of the
    computation, or quantised. An adapter is merged into the stored weight for the same reason.
    """

    def __init__(self, model: PackedVLM, base: str, *, leads: bool) -> None:
        """Refer to a model.

        Args:
            model: The trained model.
            base: Folder or hub id of the base model.
            leads: This rank wants the weights; the others only take part.
        """
        self._leads = leads
        self._sizes = base_sizes(model.hf)
        for name in model.hf.all_tied_weights_keys:
            # One parameter under two names would be larger on disk, and could come apart when edited.
            self._sizes.pop(name)
        self._trained = {name: p for name, p in model.hf.state_dict(keep_vars=True).items() if p.requires_grad}
        self._adapted = adapted_weights(model.hf)
        self._stored = StoredWeights(base, model.family, self._sizes) if leads else None
        self._family = model.family

    def sizes(self, dtype: torch.dtype) -> dict[str, int]:
        """Return the bytes of each weight in some type, in the order of the model; what is kept has its own type.

        Ranks that only take part have no part in what is kept.
        """
        sizes = {name: elements * dtype.itemsize for name, elements in self._sizes.items()}
        return sizes | (self._stored.kept if self._stored else {})

    def name_in_base(self, name: str) -> str:
        """Return what a weight is called in the base model's files; asked by the rank that wants the weights."""
        return self._stored.stored_name(name)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Return a weight on the CPU, converted unless it is kept.

        Nothing on ranks that only take part; called by all ranks in the same order.
        """
        if name not in self._sizes:
            return self._stored.read(name)
        weight = self._read(name)
        return None if weight is None else weight.to(dtype)

    def _read(self, name: str) -> torch.Tensor | None:
        if name in self._adapted:
            layer = self._adapted[name]
            adapter = gathered_adapter(layer)
            if not self._stored:
                return None
            shape = (*adapter["lora_B"].shape[:-1], adapter["lora_A"].shape[-1])
            whole = merged(self._turned(name, self._stored.read(name), shape), adapter, layer.form)
            return self._turned(name, whole, shape)
        if name in self._trained:
            whole = gathered(self._trained[name])
            return self._turned(name, whole, whole.shape) if self._stored else None
        return self._stored.read(name) if self._stored else None

    def _turned(self, name: str, weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Exchange the last two dimensions of a weight, of this shape in the module, if it is stored so."""
        turned = self._family.is_transposed(name, self._stored.shape(name), shape)
        return weight.transpose(-1, -2) if turned else weight
