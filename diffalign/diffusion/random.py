"""Randomness that is keyed, not streamed.

Every random number belongs to a key such as ``(seed, "noise", step, sample_id)`` and is drawn on the CPU in float32.
So a run is the same run in other micro-batches, on one process or four, on a CPU or a GPU up to arithmetic, and
resumed anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = Sequence[int | str]


def key_seed(*key: int | str) -> int:
    """A 63-bit seed for a key; keys that differ in any part, or in its type, get unrelated seeds."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one key."""
    return torch.Generator("cpu").manual_seed(key_seed(*key))


def keyed_noise(keys: Sequence[Key], shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise, one draw of ``shape`` per key: (len(keys), *shape), float32, CPU."""
    return torch.stack([torch.randn(*shape, generator=keyed_generator(*key)) for key in keys])


def keyed_uniform(keys: Sequence[Key]) -> Tensor:
    """One uniform number in [0, 1) per key: (len(keys),), float32, CPU."""
    return torch.cat([torch.rand(1, generator=keyed_generator(*key)) for key in keys])


def keyed_permutation(n: int, *key: int | str) -> Tensor:
    """A permutation of 0 .. n-1 for one key, int64."""
    return torch.randperm(n, generator=keyed_generator(*key))
