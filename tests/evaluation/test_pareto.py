from __future__ import annotations

import numpy as np
import pytest

from diffalign.errors import UserError
from diffalign.evaluation.pareto import pareto_front


def test_by_hand() -> None:
    points = [(1, 5), (2, 4), (2, 3), (3, 1), (0, 6)]
    assert pareto_front(points).tolist() == [True, True, False, True, True]


def test_equal_points_stay_together_and_one_axis_has_its_maximum() -> None:
    assert pareto_front([(1, 1), (1, 1), (0, 1)]).tolist() == [True, True, False]
    assert pareto_front([[1.0], [3.0], [2.0]]).tolist() == [False, True, False]


def test_agrees_with_the_definition() -> None:
    points = np.random.default_rng(0).integers(0, 5, size=(60, 3)).astype(float)
    by_definition = [not any((q >= p).all() and (q > p).any() for q in points) for p in points]
    assert pareto_front(points).tolist() == by_definition


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(UserError, match="finite table"):
        pareto_front([1.0, 2.0])
