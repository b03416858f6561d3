"""Which settings nothing beats in everything: the front of points that trade one good thing for another."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.errors import UserError


def pareto_front(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates: is at least as good in all axes and better in one.

    Args:
        points: (n, k), higher is better in each column. Equal points are kept together.

    Returns:
        (n,) bool.

    Raises:
        UserError: another shape, or a number that is not finite.
    """
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise UserError(f"points must be a finite table of n rows and k columns, got {values.shape}")
    # [i, j]: whether point j is at least as good as i everywhere, and better somewhere.
    least = np.all(values[None] >= values[:, None], axis=-1)
    better = np.any(values[None] > values[:, None], axis=-1)
    dominated: NDArray[np.bool_] = np.any(np.logical_and(least, better), axis=1)
    return np.logical_not(dominated)
