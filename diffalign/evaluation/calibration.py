"""How right a reward is about pairs, and how right about its own certainty. Only numpy is needed.

Pairs are given as ``margins``, score of the first image minus score of the second, and ``labels``, the probability
that the first is preferred (0.5: a tie). A reward on Bradley-Terry's scale predicts sigmoid(margin).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.errors import UserError
from diffalign.evaluation.stats import wilson

TEMPERATURES = (0.01, 100.0)
"""Where a temperature is looked for. At the upper end the scores say nothing about the preferences."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs in which the preferred image scores higher.

    Attributes:
        rate: in [0, 1]; ties among the labels are left out, equal scores count half.
        low, high: 95 % Wilson interval; it takes pairs as independent.
        n: pairs counted.
    """

    rate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted winner has a probability in [low, high): ``n`` of them, on average predicted
    ``confidence`` and preferred in a share of ``frequency`` (a tie counts half)."""

    low: float
    high: float
    n: int
    confidence: float
    frequency: float


def pairwise_accuracy(margins: ArrayLike, labels: ArrayLike) -> Accuracy | None:
    """Accuracy over the pairs that are no ties; None where all are.

    Raises:
        UserError: lengths differ, or a margin is not finite.
    """
    margin, label = _ready(margins, labels)
    margin, label = margin[label != 0.5], label[label != 0.5]
    if not len(margin):
        return None
    right, equal = int((margin * (label - 0.5) > 0).sum()), int((margin == 0).sum())
    low, high = wilson(right, len(margin), ties=equal)
    return Accuracy((right + equal / 2) / len(margin), low, high, len(margin))


def accuracy_by(margins: ArrayLike, labels: ArrayLike, keys: Sequence[Hashable]) -> dict[Hashable, Accuracy]:
    """:func:`pairwise_accuracy` of the pairs of each key, such as the user who chose; None as a key is left out."""
    margin, label = _ready(margins, labels)
    result = {}
    for key in sorted({key for key in keys if key is not None}, key=str):
        rows = np.array([other == key for other in keys])
        if (accuracy := pairwise_accuracy(margin[rows], label[rows])) is not None:
            result[key] = accuracy
    return result


def accuracy_with_ties(margins: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """PickScore's accuracy on all pairs: a tie is predicted where |P(first) - P(second)| <= ``threshold``.

    A right prediction counts 1, a tie predicted for a choice or the other way round 0.5, the wrong image 0.
    """
    margin, label = _ready(margins, labels)
    predicted = np.where(np.abs(np.tanh(margin / 2)) <= threshold, 0.0, np.sign(margin))
    return float((1 - np.abs(predicted - np.sign(label - 0.5)) / 2).mean())


def fit_tie_threshold(margins: ArrayLike, labels: ArrayLike) -> float:
    """The threshold in [0, 1] of :func:`accuracy_with_ties` that is best on these pairs; the lowest of equals."""
    candidates = np.linspace(0, 1, 101)
    return float(max(candidates, key=lambda threshold: (accuracy_with_ties(margins, labels, threshold), -threshold)))


def negative_log_likelihood(margins: ArrayLike, labels: ArrayLike, temperature: float = 1.0) -> float:
    """Mean cross-entropy of sigmoid(margin / temperature) against the labels, in nats; log 2 knows nothing."""
    margin, label = _ready(margins, labels)
    z = margin / temperature
    return float((np.logaddexp(0, -z) * label + np.logaddexp(0, z) * (1 - label)).mean())


def fit_temperature(margins: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T in :data:`TEMPERATURES` for which sigmoid(margin / T) fits the labels best (Guo et al. 2017).

    Cross-entropy is convex in 1 / T, so its derivative is bisected. Scores that are no better than chance get the
    largest T.
    """
    margin, label = _ready(margins, labels)

    def slope(inverse: float) -> float:
        return float((margin * (0.5 * (1 + np.tanh(margin * inverse / 2)) - label)).mean())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(low) >= 0:
        return TEMPERATURES[1]
    if slope(high) <= 0:
        return TEMPERATURES[0]
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high


def reliability(margins: ArrayLike, labels: ArrayLike, temperature: float = 1.0, bins: int = 10) -> list[Bin]:
    """The reliability table of the predicted winners: bins of equal width over [0.5, 1], empty ones left out."""
    margin, label = _ready(margins, labels)
    confidence = 1 / (1 + np.exp(-np.abs(margin) / temperature))
    won = np.where(margin >= 0, label, 1 - label)
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    return [
        Bin(
            float(edges[b]),
            float(edges[b + 1]),
            int((place == b).sum()),
            float(confidence[place == b].mean()),
            float(won[place == b].mean()),
        )
        for b in range(bins)
        if (place == b).any()
    ]


def expected_calibration_error(table: Sequence[Bin]) -> float:
    """Mean over pairs of |confidence - frequency| of their bin, in [0, 1]."""
    total = sum(row.n for row in table)
    return sum(row.n * abs(row.confidence - row.frequency) for row in table) / total


def _ready(margins: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    margin, label = np.asarray(margins, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if margin.ndim != 1 or margin.shape != label.shape:
        raise UserError(f"margins and labels must be two lists of one length, got {margin.shape} and {label.shape}")
    if not np.isfinite(margin).all():
        raise UserError(f"margin {int(np.flatnonzero(~np.isfinite(margin))[0])} is not finite")
    return margin, label
