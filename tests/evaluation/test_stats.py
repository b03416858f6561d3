from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign.errors import UserError
from diffalign.evaluation import stats

A = [21.3, 20.9, 22.1, 21.7, 20.5, 21.9]
B = [21.0, 21.1, 21.6, 21.7, 20.1, 21.2]


def scores(wins: int, ties: int, losses: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.concatenate([np.ones(wins), np.zeros(ties), -np.ones(losses)])
    return a, np.zeros(wins + ties + losses)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high", "p_value"),
    [
        (290, 500, 0.5363, 0.6225, 0.0004),
        (275, 500, 0.5062, 0.5931, 0.028),
        (55, 100, 0.4524, 0.6439, 0.37),
        (860, 1632, 0.5027, 0.5511, 0.031),
        (1720, 3200, 0.5202, 0.5547, None),
    ],
)
def test_known_intervals(wins: int, n: int, low: float, high: float, p_value: float | None) -> None:
    result = stats.win_rate(*scores(wins, 0, n - wins))
    assert (result.low, result.high) == pytest.approx((low, high), abs=6e-5)
    assert (result.wins, result.losses, result.n, result.prompts) == (wins, n - wins, n, n)
    if p_value is not None:
        assert result.p_value == pytest.approx(p_value, rel=0.05)


def test_agrees_with_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40, 333, 2000):
        wins = int(rng.integers(0, n + 1))
        theirs = scipy_stats.binomtest(wins, n, 0.5)
        for confidence in (0.8, 0.95, 0.99):
            interval = theirs.proportion_ci(confidence, method="wilson")
            ours = stats.wilson(wins, n, confidence=confidence)
            assert ours == pytest.approx((interval.low, interval.high), abs=1e-12)
        assert stats.sign_test(wins, n - wins) == pytest.approx(theirs.pvalue, rel=1e-9)


def test_small_example() -> None:
    result = stats.win_rate(A, B)
    assert (result.rate, result.wins, result.ties, result.losses) == (0.75, 4, 1, 1)
    assert result.p_value == pytest.approx(2 * 6 / 32)
    difference = stats.paired_difference(A, B)
    assert difference.mean == pytest.approx(0.283333, abs=1e-6)
    assert difference.standard_error == pytest.approx(0.135195, abs=1e-6)
    assert (difference.low, difference.high) == pytest.approx((0.0333, 0.5167), abs=1e-4)


def test_ties_are_within_the_tolerance() -> None:
    a, b = np.array([0.1 + 0.2, 1.0, 1.0]), np.array([0.3, 1.0 + 1e-7, 1.0 - 1e-3])
    assert stats.win_rate(a, b).ties == 2
    assert stats.win_rate(a, b, tie_tolerance=0).ties == 0
    assert stats.win_rate(a, b, tie_tolerance=0.01).ties == 3


def test_ties_narrow_the_interval_but_never_to_a_point() -> None:
    low, high = stats.wilson(50, 100)
    tied_low, tied_high = stats.wilson(25, 100, ties=50)
    assert low < tied_low < 0.5 < tied_high < high
    all_low, all_high = stats.wilson(0, 3, ties=3)
    assert all_high - all_low > 0.3


@pytest.mark.parametrize(("win", "tie"), [(0.5, 0.0), (0.45, 0.1), (0.3, 0.6), (0.65, 0.2), (0.8, 0.15), (0.05, 0.9)])
@pytest.mark.parametrize("n", [30, 256])
def test_interval_covers_the_truth_as_often_as_it_says(win: float, tie: float, n: int) -> None:
    truth = win + tie / 2
    counts = np.random.default_rng(0).multinomial(n, [win, tie, 1 - win - tie], size=4000)
    bounds = np.array([stats.wilson(int(w), n, ties=int(t)) for w, t, _ in counts])
    covered = ((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean()
    few_decide = n * (1 - tie) < 10  # too few for a tight interval: it errs on the wide side
    assert 0.935 < covered < (1 if few_decide else 0.985)


def test_equal_models_are_called_different_no_more_often_than_stated() -> None:
    flips = np.random.default_rng(1).binomial(256, 0.5, size=2000)
    share = np.mean([stats.sign_test(int(k), 256 - int(k)) < 0.05 for k in flips])
    assert share < 0.06


def test_several_images_of_a_prompt_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(2)
    per_prompt = rng.normal(0.1, 1, size=60)
    a = np.repeat(per_prompt, 4)
    groups = np.repeat(np.arange(60), 4).tolist()
    clustered = stats.win_rate(a, np.zeros(240), groups=groups)
    single = stats.win_rate(per_prompt, np.zeros(60))
    naive = stats.win_rate(a, np.zeros(240))
    assert (clustered.n, clustered.prompts) == (240, 60)
    assert clustered.rate == single.rate == naive.rate
    assert clustered.p_value == single.p_value > naive.p_value
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.1)
    assert naive.high - naive.low < 0.6 * (clustered.high - clustered.low)
    assert stats.paired_difference(a, 0 * a, groups=groups).standard_error == pytest.approx(
        stats.paired_difference(per_prompt, np.zeros(60)).standard_error
    )


def test_clustered_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(50), 4).tolist()
    covered = 0
    for trial in range(200):
        chance = np.repeat(rng.beta(3, 2, size=50), 4)
        result = stats.win_rate(rng.random(200) < chance, np.full(200, 0.5), groups=groups, draws=500, seed=trial)
        covered += result.low <= 0.6 <= result.high
    assert 0.89 < covered / 200 < 0.99


def test_groups_of_one_are_no_groups() -> None:
    assert stats.win_rate(A, B, groups=list("abcdef")) == stats.win_rate(A, B)


def test_bootstrap_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stats.paired_difference(A, B)
    monkeypatch.setattr(stats, "_BOOTSTRAP_CHUNK", 100)
    assert stats.paired_difference(A, B) == whole


def test_line() -> None:
    assert str(stats.win_rate(*scores(150, 30, 76))) == (
        "win rate 0.64 [0.59, 0.70] (n=256, 150 wins, 30 ties, 76 losses)"
    )
    grouped = stats.win_rate([1.0, 1.0, 0.0, 1.0], [0.0] * 4, groups=["x", "x", "y", "y"])
    assert "(n=4 over 2 prompts, 3 wins, 1 ties, 0 losses)" in str(grouped)
    assert str(stats.paired_difference(A, B)) == "difference +0.283 [+0.033, +0.517] (n=6)"


def test_bad_scores_are_named() -> None:
    with pytest.raises(UserError, match=r"\(3,\) and \(2,\)"):
        stats.win_rate([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(UserError, match="no scores"):
        stats.win_rate([], [])
    with pytest.raises(UserError, match="score 1 of 'b' is nan"):
        stats.win_rate([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(UserError, match="2 groups for 3"):
        stats.win_rate([1.0, 2.0, 3.0], [0.0] * 3, groups=[1, 2])
    with pytest.raises(ValueError, match="impossible"):
        stats.wilson(3, 2)


def test_of_one_prompt_the_seeds_are_the_units() -> None:
    """A bootstrap over one prompt would make a certainty of whatever was seen."""
    a, b = np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0, 0.0])
    grouped, plain = stats.win_rate(a, b, groups=["p"] * 4), stats.win_rate(a, b)
    assert (grouped.low, grouped.high, grouped.p_value) == (plain.low, plain.high, plain.p_value)
    assert grouped.prompts == 1 and "n=4 of one prompt" in str(grouped)
    difference = stats.paired_difference(a, b, groups=["p"] * 4)
    assert difference.low < difference.mean < difference.high and difference.prompts == 1
