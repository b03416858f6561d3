from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign.errors import UserError
from diffalign.evaluation.calibration import (
    TEMPERATURES,
    accuracy_by,
    accuracy_with_ties,
    expected_calibration_error,
    fit_temperature,
    fit_tie_threshold,
    negative_log_likelihood,
    pairwise_accuracy,
    reliability,
)
from diffalign.evaluation.stats import wilson

MARGINS, LABELS = [2.0, -1.0, 0.5, 0.0, 3.0], [1.0, 1.0, 0.0, 1.0, 0.5]


def test_ties_of_labels_are_left_out_and_equal_scores_count_half() -> None:
    found = pairwise_accuracy(MARGINS, LABELS)
    assert found is not None
    assert (found.rate, found.n) == (1.5 / 4, 4)
    assert (found.low, found.high) == wilson(1, 4, ties=1)
    assert pairwise_accuracy([1.0], [0.5]) is None


def test_accuracy_of_each_user() -> None:
    found = accuracy_by(MARGINS, LABELS, ["a", "a", "b", None, "c"])
    assert {user: (accuracy.rate, accuracy.n) for user, accuracy in found.items()} == {"a": (0.5, 2), "b": (0.0, 1)}


def test_accuracy_with_ties_gives_half_for_confusing_tie_and_choice() -> None:
    # Differences of probability are 0.7616, -0.4621, 0.2449, 0 and 0.9051.
    assert accuracy_with_ties(MARGINS, LABELS, 0.0) == pytest.approx((1 + 0 + 0 + 0.5 + 0.5) / 5)
    assert accuracy_with_ties(MARGINS, LABELS, 0.5) == pytest.approx((1 + 0.5 + 0.5 + 0.5 + 0.5) / 5)
    assert accuracy_with_ties(MARGINS, LABELS, 1.0) == pytest.approx((0.5 * 4 + 1) / 5)
    assert fit_tie_threshold([5.0, -5.0, 0.1], [1.0, 0.0, 0.5]) == pytest.approx(0.05)


def test_the_temperature_of_scores_that_were_scaled_is_found() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20_000)
    labels = 1 / (1 + np.exp(-margins))
    assert fit_temperature(margins, labels) == pytest.approx(1, abs=1e-6)
    assert fit_temperature(7 * margins, labels) == pytest.approx(7, abs=1e-5)
    drawn = (rng.random(20_000) < labels).astype(float)
    assert fit_temperature(margins, drawn) == pytest.approx(1, abs=0.05)


def test_the_fitted_temperature_is_the_best_one() -> None:
    best = fit_temperature(MARGINS[:3] + [4.0], LABELS[:3] + [1.0])
    here = negative_log_likelihood(MARGINS[:3] + [4.0], LABELS[:3] + [1.0], best)
    assert all(negative_log_likelihood(MARGINS[:3] + [4.0], LABELS[:3] + [1.0], best * f) > here for f in (0.9, 1.1))


def test_what_is_no_better_than_chance_gets_the_highest_temperature() -> None:
    assert fit_temperature([1.0, 2.0], [0.0, 0.0]) == TEMPERATURES[1]
    assert fit_temperature([1.0, 2.0], [1.0, 1.0]) == TEMPERATURES[0]


def test_reliability_looks_at_the_predicted_winner() -> None:
    margins, labels = [math.log(3), -math.log(3), math.log(3), math.log(3)], [1.0, 0.0, 0.0, 0.5]
    (row,) = reliability(margins, labels)
    assert (row.n, row.low, row.high) == (4, 0.75, 0.8)
    assert row.confidence == pytest.approx(0.75)
    assert row.frequency == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert expected_calibration_error([row]) == pytest.approx(0.75 - 0.625)


def test_perfect_calibration_has_no_error() -> None:
    margins = np.linspace(-4, 4, 4001)
    table = reliability(margins, 1 / (1 + np.exp(-margins)))
    assert expected_calibration_error(table) == pytest.approx(0, abs=1e-12)
    assert sum(row.n for row in table) == 4001


def test_what_is_no_margin_is_refused() -> None:
    with pytest.raises(UserError, match="margin 1 is not finite"):
        pairwise_accuracy([0.0, math.nan], [1.0, 1.0])
    with pytest.raises(UserError, match="of one length"):
        fit_temperature([0.0], [1.0, 1.0])
