"""Advantages: how much better an image is than what the policy usually draws for its prompt.

Rewards arrive for all images of a rollout, from all processes, with the group (prompt) of each. What is returned has
mean 0 within whatever it was centred on, so that a reward shared by all images moves nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Scale = Literal["group", "global"]


def group_advantages(rewards: Tensor, groups: Tensor, *, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """``(R - mean of the group) / (std + eps)``, as in GRPO (Shao et al. 2024, arXiv 2402.03300).

    Args:
        rewards: (N,); NaN where an image has none, which leaves it out and gives it advantage 0.
        groups: int64 (N,): equal for the images of one prompt.
        scale: divide by the group's own (population) standard deviation, or by that of all N rewards, as Flow-GRPO and
            AWM do: then a prompt whose images hardly differ counts little.
        eps: keeps the quotient finite. A group of identical rewards gets exactly 0.

    Returns:
        (N,) float32.
    """
    valid = torch.isfinite(rewards)
    values = torch.where(valid, rewards.double(), 0)
    _, member = groups.unique(return_inverse=True)
    weight = valid.double()

    def by_group(x: Tensor) -> Tensor:
        return torch.zeros(int(member.max()) + 1, dtype=torch.float64).index_add_(0, member, x)[member]

    count = by_group(weight).clamp(min=1)
    centred = (values - by_group(values) / count) * weight
    if scale == "group":
        std = (by_group(centred**2) / count).sqrt()
    else:
        kept = rewards.double()[valid]
        std = kept.std(correction=0) if len(kept) else torch.zeros((), dtype=torch.float64)
    # Rounding alone must not be blown up to a signal.
    centred = torch.where(centred.abs() <= 1e-9 * (1 + values.abs()), 0, centred)
    return (centred / (std + eps)).float()


def batch_advantages(rewards: Tensor, *, eps: float = 1e-8) -> Tensor:
    """``(R - mean) / (std + eps)`` over all N rewards, (N,) to (N,): DDPO without its tracker."""
    return group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.int64), eps=eps)


def combined_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    *,
    scale: Scale = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Normalise each reward on its own, then add: ``sum_k w_k A_k``, (N,).

    So a weight says how much a reward counts, whatever its unit; adding raw rewards lets the one with the widest
    spread within groups decide. This is "normalise, then sum" of GDPO.
    """
    parts = [weights[name] * group_advantages(r, groups, scale=scale, eps=eps) for name, r in rewards.items()]
    return torch.stack(parts).sum(0)


def zero_variance_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Ids of the groups whose images all got the same reward, or fewer than two any: nothing to learn from, (G0,)."""
    dead = []
    for group in groups.unique():
        members = rewards[groups == group]
        members = members[torch.isfinite(members)]
        if len(members) < 2 or bool((members == members[0]).all()):
            dead.append(int(group))
    return torch.tensor(dead, dtype=torch.int64)


class PromptStatTracker:
    """Running statistics of each prompt's rewards, for advantages of prompts that recur with few images at a time.

    Each prompt has a first-in-first-out buffer of its last rewards, and its images are judged by the buffer's mean and
    population standard deviation, the new rewards included; until ``min_count`` are in it, by those of the whole
    rollout (Black et al. 2023, arXiv 2305.13301, and its authors' code).

    Args:
        buffer_size: rewards remembered of each prompt.
        min_count: fewer than this use the statistics of the rollout.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self.buffers: dict[str, deque[float]] = {}

    def update(self, prompt_ids: Sequence[str], rewards: Tensor, *, eps: float = 1e-6) -> Tensor:
        """Take in N rewards and return their advantages.

        Args:
            prompt_ids: the prompt of each image, by an id of its own: two prompts that read alike are still two.
            rewards: (N,); NaN gives advantage 0 and is not remembered.

        Returns:
            (N,) float32.
        """
        values = rewards.double()
        valid = torch.isfinite(values)
        kept = values[valid]
        advantages = torch.zeros(len(values), dtype=torch.float64)
        for prompt in dict.fromkeys(prompt_ids):
            mask = torch.tensor([other == prompt for other in prompt_ids]) & valid
            buffer = self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size))
            buffer.extend(values[mask].tolist())
            known = torch.tensor(list(buffer), dtype=torch.float64)
            known = kept if len(known) < self.min_count else known
            if mask.any():
                advantages[mask] = (values[mask] - known.mean()) / (known.std(correction=0) + eps)
        return advantages.float()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as JSON knows it."""
        return {prompt: list(buffer) for prompt, buffer in self.buffers.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Read back what :meth:`state_dict` gave."""
        self.buffers = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()}
