"""One total from several rewards. Pure functions of K rewards of N images, (K, N), all on one scale where they mix.

A NaN (no score) of any member makes the total NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["sum", "lsc", "mean", "median", "min", "mean_std", "uwo", "vote"]
MODES = ("sum", "lsc", "mean", "median", "min", "mean_std", "uwo", "vote")
UNWEIGHTED = ("median", "min")
"""Modes that take one member's value as it is: a weight has no meaning there."""


def combine(
    rewards: Tensor,
    weights: Tensor,
    mode: Mode = "sum",
    *,
    uncertainty: float = 1.0,
    group_ids: Tensor | None = None,
) -> Tensor:
    """The total of each image.

    Args:
        rewards: (K, N), transformed.
        weights: (K,).
        mode: "sum": weighted sum; also "lsc", whose transform comes before. "mean": weighted mean. "median", "min"
            (worst case). "mean_std": mean less ``uncertainty`` times the members' population standard deviation;
            "uwo": less the variance (uncertainty-weighted, Coste et al. 2023, arXiv 2310.02743). "vote": see
            :func:`vote`.
        uncertainty: lambda of "mean_std" and "uwo".
        group_ids: int64 (N,), for "vote".

    Returns:
        (N,) float32.
    """
    column = weights.to(rewards)[:, None]
    total: Callable[[], Tensor] = {
        "sum": lambda: (column * rewards).sum(0),
        "lsc": lambda: (column * rewards).sum(0),
        "mean": lambda: _mean(rewards, column),
        "median": lambda: rewards.quantile(0.5, dim=0),
        "min": lambda: rewards.amin(0),
        "mean_std": lambda: _mean(rewards, column) - uncertainty * _std(rewards, column),
        "uwo": lambda: _mean(rewards, column) - uncertainty * _variance(rewards, column),
        "vote": lambda: vote(rewards, weights, _needed(group_ids)),
    }[mode]
    return total().float()


def vote(rewards: Tensor, weights: Tensor, group_ids: Tensor) -> Tensor:
    """Votes for each image: over members and over the other images of its group, how often it is the better one.

    A tie is no vote for either. In a group of two (a pair) it is the weight of the members that prefer the image.

    Args:
        rewards: (K, N). weights: (K,). group_ids: int64 (N,).

    Returns:
        (N,); not differentiable.
    """
    same = group_ids[:, None] == group_ids
    wins = (rewards[:, :, None] > rewards[:, None, :]) & same
    votes = (weights.to(rewards)[:, None] * wins.sum(-1)).sum(0)
    # A comparison with NaN is lost, and no votes must not pass for a score of 0.
    known = rewards.isfinite().all(0)
    return votes.masked_fill(~known, torch.nan)


def _mean(rewards: Tensor, column: Tensor) -> Tensor:
    return (column * rewards).sum(0) / column.sum()


def _variance(rewards: Tensor, column: Tensor) -> Tensor:
    return _mean((rewards - _mean(rewards, column)) ** 2, column)


def _std(rewards: Tensor, column: Tensor) -> Tensor:
    """The root, with gradient 0 where members agree: the root's own is infinite there."""
    variance = _variance(rewards, column)
    agree = variance == 0
    return variance.masked_fill(agree, 1).sqrt().masked_fill(agree, 0)


def _needed(group_ids: Tensor | None) -> Tensor:
    if group_ids is None:
        raise ValueError("vote needs group_ids: images of one prompt are compared with each other")
    return group_ids
