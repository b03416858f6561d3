from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from diffalign.errors import UserError
from diffalign.evaluation.multiple import adjusted, benjamini_hochberg, holm


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04; none below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]


def test_benjamini_hochberg_agrees_with_scipy() -> None:
    p = np.random.default_rng(0).uniform(size=40) ** 2
    assert benjamini_hochberg(p) == pytest.approx(false_discovery_control(p))


def test_holm_bounds_the_chance_of_any_false_claim() -> None:
    rng = np.random.default_rng(1)
    null = rng.uniform(size=(4000, 10))
    any_claim = np.mean([(holm(row) < 0.05).any() for row in null])
    assert 0.035 < any_claim < 0.065
    assert np.mean([(adjusted(row, "none") < 0.05).any() for row in null]) > 0.3


def test_none_is_none_and_what_is_no_p_value_is_refused() -> None:
    assert adjusted([], "holm").shape == (0,)
    with pytest.raises(UserError, match="from 0 to 1"):
        holm([0.2, 1.2])
