"""Cross-entropy of the supervised tokens, without ever holding the logits of a whole pack."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Logits held at once: 2**27 float32 values are 512 MiB. Chunks are no smaller than memory asks for, because each adds a
# gradient to that of the whole output embedding, in bfloat16 where that is what the model computes in.
_MAX_LOGITS = 2**27


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of each target.

    Args:
        hidden: Last hidden states of the supervised positions `[S, H]`.
        weight: Output embedding `[V, H]`.
        targets: Token ids `[S]`.

    Returns:
        Losses `[S]`, float32. The backward pass recomputes the logits chunk by chunk.
    """
    chunk = max(1, _MAX_LOGITS // weight.shape[0])
    if len(targets) <= chunk:
        return _chunk_losses(hidden, weight, targets)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(_chunk_losses, h, weight, t, use_reentrant=False) for h, t in parts])


def _chunk_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
