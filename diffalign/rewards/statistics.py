"""Statistics of scores: running mean and variance, references of prompts, and how far rewards agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import pearsonr, rankdata

_FEWEST = 3
"""Images that a correlation is taken of at least."""


@dataclass
class RunningStats:
    """Mean and variance of all values seen, without keeping them (Welford; Chan et al. 1979 for the merging).

    Attributes:
        count, mean: of the values seen.
        m2: sum of their squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, values: Iterable[float]) -> None:
        """Take in values; those that are not finite are left out."""
        seen = np.fromiter((value for value in values if math.isfinite(value)), dtype=np.float64)
        if len(seen):
            mean = float(seen.mean())
            self.merge(RunningStats(len(seen), mean, float(((seen - mean) ** 2).sum())))

    def merge(self, other: RunningStats) -> None:
        """Take in what another process has seen."""
        if not other.count:
            return
        total, apart = self.count + other.count, other.mean - self.mean
        self.m2 += other.m2 + apart**2 * self.count * other.count / total
        self.mean += apart * other.count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 0 of no values."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, float]:
        """Plain values for JSON, from which :meth:`load_state_dict` goes on exactly."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.count, self.mean, self.m2 = int(state["count"]), float(state["mean"]), float(state["m2"])


def prompt_references(
    prompts: Sequence[str], scores: Sequence[float], quantile: float | None = None
) -> dict[str, float]:
    """What a reward usually gives for each prompt: the reference of the log-sigmoid transform.

    Args:
        prompts, scores: of N images of the model before it is trained, 8 to 16 for each prompt.
        quantile: of a prompt's scores, such as 0.85, so that "good" means better than most; None for their mean.

    Returns:
        The reference of each prompt. Scores that are not finite are left out.
    """
    by_prompt: dict[str, list[float]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        if math.isfinite(score):
            by_prompt.setdefault(prompt, []).append(score)
    return {
        prompt: float(np.mean(values) if quantile is None else np.quantile(values, quantile))
        for prompt, values in by_prompt.items()
    }


def correlation(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of two rewards on the images that both have scored.

    Returns:
        "pearson", "spearman" in [-1, 1], NaN for fewer than three images or a constant reward; "count" of the images.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < _FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"pearson": math.nan, "spearman": math.nan, "count": len(x)}
    return {
        "pearson": float(pearsonr(x, y).statistic),
        "spearman": float(pearsonr(rankdata(x), rankdata(y)).statistic),
        "count": len(x),
    }
