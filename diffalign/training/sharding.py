"""Weights that are shared out between processes (FSDP2)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its shard; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
