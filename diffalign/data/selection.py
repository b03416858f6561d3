"""Which of a prompt's images make a pair: functions of scores.

``scores`` are those of the k images of one prompt, (k,) floats, higher better. An image that could not be scored is
NaN and is never chosen. A spread is the population standard deviation of the group.

The points between which pairs are formed are those of Xiao et al. 2025, "Finding the Sweet Spot: Preference Data
Construction for Scaling Preference Optimization", arXiv 2502.16825: the largest and the smallest score, and the scores
nearest to the mean and to one and two spreads above and below it. For language models the paper finds that the best
against the worst gets worse as k grows, since the worst of many is trivially bad, and that the best against the one
nearest to mu - 2 sigma does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Point = Literal["max", "mu+2s", "mu+s", "mu", "mu-s", "mu-2s", "min"]
POINTS: dict[str, float] = {"mu+2s": 2.0, "mu+s": 1.0, "mu": 0.0, "mu-s": -1.0, "mu-2s": -2.0}
"""Spreads above the mean of the points that are no extremes."""


@dataclass(frozen=True)
class Choice:
    """Indices of a pair within its group, and by how much the chosen image scored more; always above 0."""

    chosen: int
    rejected: int
    gap: float


def spread(scores: ArrayLike) -> float:
    """Population standard deviation of the scores that are there; NaN where none is."""
    values = np.asarray(scores, np.float64)
    values = values[np.isfinite(values)]
    return float(values.std()) if len(values) else float("nan")


def nearest(scores: ArrayLike, point: Point) -> int | None:
    """Index of the score nearest to a point of the group; the first of equals, None where no image has a score.

    Raises:
        ValueError: there is no such point.
    """
    values = np.asarray(scores, np.float64)
    there = np.isfinite(values)
    if point not in POINTS and point not in ("max", "min"):
        raise ValueError(f"{point!r} is not one of max, {', '.join(POINTS)}, min")
    if not there.any():
        return None
    if point in ("max", "min"):
        sign = 1 if point == "max" else -1
        return int(np.argmax(np.where(there, sign * values, -np.inf)))
    target = values[there].mean() + POINTS[point] * values[there].std()
    return int(np.argmin(np.where(there, np.abs(values - target), np.inf)))


def pair_at(scores: ArrayLike, chosen: Point = "max", rejected: Point = "min") -> Choice | None:
    """The pair of the scores nearest to two points; None where these are no better and worse image.

    Best against worst is ("max", "min"), the pair of arXiv 2502.16825 is ("max", "mu-2s").
    """
    values = np.asarray(scores, np.float64)
    first, second = nearest(values, chosen), nearest(values, rejected)
    if first is None or second is None or not values[first] > values[second]:
        return None
    return Choice(first, second, float(values[first] - values[second]))


def all_pairs(scores: ArrayLike) -> list[Choice]:
    """Every pair of different scores, the widest gap first; of equal gaps in the order of the images."""
    values = np.asarray(scores, np.float64)
    found = [
        Choice(a, b, float(values[a] - values[b]))
        for a in range(len(values))
        for b in range(len(values))
        if values[a] > values[b]
    ]
    return sorted(found, key=lambda choice: -choice.gap)


def wide_enough(
    choices: Sequence[Choice], scores: ArrayLike, margin: float, unit: Literal["absolute", "sigma"] = "absolute"
) -> list[Choice]:
    """Those whose gap is at least ``margin``, in units of the score or of the group's spread."""
    least = margin * (spread(scores) if unit == "sigma" else 1.0)
    return [choice for choice in choices if choice.gap >= least]


def agreement(choice: Choice, by_scorer: ArrayLike) -> int:
    """How many scorers score the chosen image above the rejected one; ``by_scorer`` is (m, k)."""
    values = np.asarray(by_scorer, np.float64)
    return int((values[:, choice.chosen] > values[:, choice.rejected]).sum())


def agreed(choices: Sequence[Choice], by_scorer: ArrayLike, at_least: int) -> list[Choice]:
    """Those on which at least so many of the m scorers agree.

    Raises:
        ValueError: there are fewer scorers than that.
    """
    values: NDArray[np.float64] = np.asarray(by_scorer, np.float64)
    if at_least > len(values):
        raise ValueError(f"{at_least} scorers cannot agree, there are {len(values)}")
    return [choice for choice in choices if agreement(choice, values) >= at_least]


def capped(choices: Sequence[Choice], limit: int | None) -> list[Choice]:
    """At most ``limit`` of a prompt's pairs: those with the widest gaps, in the order they come."""
    if limit is None or len(choices) <= limit:
        return list(choices)
    kept = sorted(range(len(choices)), key=lambda i: -choices[i].gap)[:limit]
    return [choices[i] for i in sorted(kept)]


def easiest(difficulty: ArrayLike, share: float) -> NDArray[np.intp]:
    """Indices of the easiest pairs, easy to hard: those of Selective DPO (Gao et al. 2025, arXiv 2502.09650).

    Args:
        difficulty: of each pair, (n,): its held-out loss; equal ones stay in their order.
        share: of the pairs to keep, in (0, 1]; at least one is kept.

    Raises:
        ValueError: the share is outside, or a difficulty is not finite.
    """
    values = np.asarray(difficulty, np.float64)
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if not np.isfinite(values).all():
        raise ValueError(f"the difficulty of pair {int(np.argmin(np.isfinite(values)))} is not finite")
    return np.argsort(values, kind="stable")[: max(1, round(share * len(values)))]
