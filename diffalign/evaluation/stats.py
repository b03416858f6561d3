"""Is it better, and how sure can we be? Paired win rates and score differences with their uncertainty.

Scores are paired: entry i of both models was made from the same prompt with the same seed. Only numpy is needed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.errors import UserError

Floats = NDArray[np.float64]
_BOOTSTRAP_CHUNK = 2**22


@dataclass(frozen=True)
class WinRate:
    """How often one model beats another.

    Attributes:
        rate: (wins + ties / 2) / n, in [0, 1].
        low, high: confidence interval of the rate.
        wins, ties, losses: counted over pairs of images; their sum is ``n``.
        n: pairs of images compared.
        p_value: exact two-sided sign test that winning and losing are equally likely, ties left out.
        prompts: independent units behind the interval (``n`` unless several images share a prompt).
    """

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int
    p_value: float
    prompts: int

    def __str__(self) -> str:
        over = "of one prompt" if self.prompts == 1 else f"over {self.prompts} prompts"
        count = f"n={self.n}" if self.prompts == self.n else f"n={self.n} {over}"
        return (
            f"win rate {self.rate:.2f} [{self.low:.2f}, {self.high:.2f}] "
            f"({count}, {self.wins} wins, {self.ties} ties, {self.losses} losses)"
        )


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b with its bootstrap interval, in the units of the score.

    ``standard_error`` is that of the mean over independent prompts.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    n: int
    prompts: int

    def __str__(self) -> str:
        return f"difference {self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (n={self.n})"


def win_rate(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    tie_tolerance: float = 1e-6,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """How often ``a`` beats ``b``; a difference within ``tie_tolerance`` is half a win.

    With one pair a prompt the interval is :func:`wilson`'s. Where ``groups`` says that several pairs share a prompt,
    they are not independent: the interval is then a percentile bootstrap over prompts, and the sign test counts each
    prompt once, by whether more of its pairs are won or lost. Where all pairs are of one prompt, its seeds are what is
    independent, and nothing is said of other prompts.

    Args:
        a: scores of the model in question, (n,).
        b: scores of the model it is compared with, (n,), in the same order.
        groups: the prompt that each pair belongs to, (n,); None if every pair has its own.
        confidence: of the interval, in (0, 1).
        draws: bootstrap draws.
        seed: of the bootstrap.

    Raises:
        UserError: lengths differ, nothing to compare, or a score is not finite.
    """
    difference = _differences(a, b)
    outcome = np.where(np.abs(difference) <= tie_tolerance, 0.5, (difference > 0).astype(np.float64))
    wins, losses = int((outcome == 1).sum()), int((outcome == 0).sum())
    n = len(outcome)
    sums, sizes = _per_group(outcome, groups)
    prompts = len(set(groups)) if groups is not None else n
    if len(sums) == n:
        low, high = wilson(wins, n, ties=n - wins - losses, confidence=confidence)
        p_value = sign_test(wins, losses)
    else:
        low, high = _bootstrap_interval(sums, sizes, confidence, draws, seed)
        lead = sums - sizes / 2
        p_value = sign_test(int((lead > 0).sum()), int((lead < 0).sum()))
    return WinRate(float(outcome.mean()), low, high, wins, n - wins - losses, losses, n, p_value, prompts)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Mean of ``a - b`` with a percentile bootstrap interval over prompts. Arguments as in :func:`win_rate`."""
    difference = _differences(a, b)
    sums, sizes = _per_group(difference, groups)
    low, high = _bootstrap_interval(sums, sizes, confidence, draws, seed)
    mean = float(difference.mean())
    # Of a ratio of sums (sum of differences over number of pairs), linearised; the usual s / sqrt(n) for equal sizes.
    units = len(sums)
    prompts = len(set(groups)) if groups is not None else units
    residuals = (sums - mean * sizes) / sizes.mean()
    error = math.sqrt(float((residuals**2).sum()) / (units - 1) / units) if units > 1 else math.nan
    return PairedDifference(mean, low, high, error, len(difference), prompts)


def wilson(wins: int, n: int, *, ties: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for the rate (wins + ties / 2) / n.

    An outcome of 0, 1/2 or 1 with mean m and share t of ties has variance m (1 - m) - t / 4. The bounds are the m with
    (rate - m)^2 = z^2 (m (1 - m) - t / 4) / n; without ties this is Wilson's interval (1927). t is estimated as
    ties / (n + z^2), so that a handful of pairs that all tie do not make a certainty.
    """
    if not 0 <= wins <= wins + ties <= n or n == 0:
        raise ValueError(f"{wins} wins and {ties} ties of {n} pairs: impossible counts")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = (wins + ties / 2) / n
    c = z * z / n
    tie_share = ties / (n + z * z)
    centre = (rate + c / 2) / (1 + c)
    reach = math.sqrt(max(centre**2 - (rate**2 + c * tie_share / 4) / (1 + c), 0.0))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of at least so uneven a split of ``wins + losses`` fair coin flips; 1 if there are none."""
    n, few = wins + losses, min(wins, losses)
    term = total = 1
    for k in range(1, few + 1):
        term = term * (n - k + 1) // k
        total += term
    return min(1.0, 2 * total / 2**n) if n else 1.0


def _differences(a: ArrayLike, b: ArrayLike) -> Floats:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise UserError(f"scores must be two lists of one length, got shapes {first.shape} and {second.shape}")
    if not len(first):
        raise UserError("no scores to compare")
    for name, scores in (("a", first), ("b", second)):
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise UserError(
                f"score {bad[0]} of {name!r} is {scores[bad[0]]} ({len(bad)} of {len(scores)} are not finite): "
                "leave out the pairs that could not be scored, in both lists"
            )
    return first - second


def _per_group(values: Floats, groups: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and number of the values of each group, in order of first appearance; of each value where all are of one."""
    if groups is not None and len(groups) != len(values):
        raise UserError(f"{len(groups)} groups for {len(values)} scores")
    if groups is None or len(set(groups)) == 1:
        return values, np.ones(len(values))
    order: dict[Hashable, int] = {}
    index = [order.setdefault(group, len(order)) for group in groups]
    return np.bincount(index, weights=values).astype(np.float64), np.bincount(index).astype(np.float64)


def _bootstrap_interval(sums: Floats, sizes: Floats, confidence: float, draws: int, seed: int) -> tuple[float, float]:
    """Percentile interval of sum(sums) / sum(sizes) when whole groups are drawn with replacement."""
    rng = np.random.default_rng(seed)
    units = len(sums)
    step = max(1, _BOOTSTRAP_CHUNK // units)
    means = []
    for start in range(0, draws, step):
        index = rng.integers(0, units, size=(min(step, draws - start), units))
        means.append(sums[index].sum(1) / sizes[index].sum(1))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)
