"""Many comparisons at once: p values that say how surprising each is, given that all of them were made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.errors import UserError

Floats = NDArray[np.float64]
Correction = Literal["holm", "bh", "none"]


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p values (1979): below 0.05 with at most 5 % chance that any true null is among them.

    The k-th smallest of m is multiplied by m - k + 1; none is smaller than one before it, or larger than 1.

    Args:
        p_values: (m,) in [0, 1], dependent in any way.
    """
    p = _checked(p_values)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return _unsorted(np.minimum(stepped, 1.0), order)


def benjamini_hochberg(p_values: ArrayLike) -> Floats:
    """Benjamini's and Hochberg's adjusted p values (1995): of those below 0.05, on average 5 % are true nulls.

    The k-th smallest of m is multiplied by m / k; none is larger than one after it.

    Args:
        p_values: (m,) in [0, 1], independent or positively dependent.
    """
    p = _checked(p_values)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    return _unsorted(np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0), order)


def adjusted(p_values: ArrayLike, correction: Correction) -> Floats:
    """The p values under a correction; "none" leaves them as they are.

    Raises:
        UserError: a value is outside [0, 1].
    """
    return CORRECTIONS[correction](p_values)


def _checked(p_values: ArrayLike) -> Floats:
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise UserError(f"p values must be a list of numbers from 0 to 1, got {p.tolist()}")
    return p


def _unsorted(values: Floats, order: NDArray[np.intp]) -> Floats:
    result = np.empty_like(values)
    result[order] = values
    return result


CORRECTIONS: dict[str, Callable[[ArrayLike], Floats]] = {"holm": holm, "bh": benjamini_hochberg, "none": _checked}
DESCRIPTIONS = {
    "holm": "p values are Holm's, adjusted for all comparisons of their table",
    "bh": "p values are Benjamini's and Hochberg's, adjusted for all comparisons of their table: of those below 0.05 "
    "one in twenty is expected to be chance",
    "none": "p values are not adjusted for the number of comparisons: one in twenty falls below 0.05 by chance",
}
"""What a report says of each correction."""
