from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from diffalign.evaluation.comparisons import (
    Scores,
    Variant,
    at_equal_settings,
    at_their_best,
    by_category,
    column_names,
    corrected,
    cross_fitted,
    per_prompt,
    rivals,
)

LOW, HIGH = Variant("base", 2.0, 10), Variant("base", 5.0, 10)
TUNED_LOW, TUNED_HIGH = Variant("tuned", 2.0, 10), Variant("tuned", 5.0, 10)


def scores(by_variant: dict[Variant, np.ndarray], per: int = 1, categories: list[str] | None = None) -> Scores:
    n = len(next(iter(by_variant.values())))
    return Scores("r", by_variant, np.arange(n) // per, categories or [""] * n)


def sample(shifts: dict[Variant, float], n: int = 200, seed: int = 0) -> dict[Variant, np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    return {variant: shared + shift + 0.5 * rng.normal(size=n) for variant, shift in shifts.items()}


def test_a_win_at_one_guidance_that_is_none_at_the_best() -> None:
    """What a comparison at one guidance hides: the base at 2 is as good as the tuned model at 5."""
    table = scores(sample({LOW: 1.0, HIGH: 0.0, TUNED_LOW: 0.9, TUNED_HIGH: 1.0}))
    equal = {one.setting: one for one in at_equal_settings(table, "base")}
    assert equal["guidance 5"].win.low > 0.8
    (best,) = at_their_best(table, "base")
    assert best.setting == "guidance 5 against 2"
    assert best.win.low < 0.5 < best.win.high


def test_a_model_gains_nothing_by_more_tries() -> None:
    """Twelve equal settings against one: the best of them is luck, and cross-fitting undoes it."""
    rng = np.random.default_rng(3)
    naive, fitted = [], []
    for _ in range(120):
        values = {Variant("base", 1.0, 10): rng.normal(size=60)}
        values |= {Variant("tuned", float(g), 10): rng.normal(size=60) for g in range(12)}
        table = scores(values)
        base = values[Variant("base", 1.0, 10)].mean()
        naive.append(max(table.by_variant[v].mean() for v in table.variants("tuned")) - base)
        fitted.append(cross_fitted(table, table.variants("tuned"))[0].mean() - base)
    assert np.mean(naive) > 0.15
    assert abs(np.mean(fitted)) < 3 * np.std(fitted) / np.sqrt(120)


def test_a_model_with_one_setting_is_compared_with_the_only_one_of_the_base() -> None:
    fast = Variant("fast", 1.0, 4)
    (one,) = at_equal_settings(scores(sample({HIGH: 0.0, fast: 2.0})), "base")
    assert one.setting == "guidance 1 against 5, 4 steps against 10" and one.win.rate > 0.9
    assert at_equal_settings(scores(sample({LOW: 0.0, HIGH: 0.0, fast: 0.0})), "base") == []
    assert at_their_best(scores(sample({HIGH: 0.0, fast: 0.0})), "base") == []


def test_numbers_of_steps_are_compared_with_the_same_number() -> None:
    base = {Variant("base", g, n): 0.1 * n for g in (1.0, 5.0) for n in (4, 30)}
    tuned = {Variant("lcm", 1.0, n): v for n, v in ((2, 1.0), (4, 2.0))}
    table = scores(sample({**base, **tuned}))
    equal = {one.setting: one for one in at_equal_settings(table, "base")}
    assert set(equal) == {"guidance 1, 4 steps"}, "the base at 2 steps was not drawn, and which of 4 is not clear"
    best = {one.setting.partition(", ")[2]: one for one in at_their_best(table, "base")}
    assert set(best) == {"2 steps against 30", "4 steps"}
    assert best["4 steps"].win.rate > 0.95 and best["2 steps against 30"].win.rate < 0.1
    assert [v.steps for v in table.series("steps")["lcm, guidance 1"]] == [2, 4]
    assert [v.guidance for v in table.series("guidance")["base, 30 steps"]] == [1.0, 5.0]


def test_columns_say_what_differs_and_what_they_are_compared_with() -> None:
    steps = [Variant("base", 5.0, n) for n in (1, 8)]
    assert column_names(steps) == ["1 step", "8 steps"] and rivals(steps) == [0, 0]
    both = [*steps, Variant("lcm", 1.0, 1), Variant("lcm", 1.0, 8), Variant("other", 1.0, 3)]
    assert column_names(both)[1:4] == [
        "base, guidance 5, 8 steps",
        "lcm, guidance 1, 1 step",
        "lcm, guidance 1, 8 steps",
    ]
    assert rivals(both) == [0, 0, 0, 1, 0]
    assert column_names([LOW]) == ["base"] and column_names([HIGH, TUNED_HIGH]) == ["base", "tuned"]
    scaled = [HIGH, *(Variant(f"tuned at {s:g}", 5.0, 10, "tuned", s) for s in (1.0, 0.5))]
    assert [v.scale for v in scores(sample(dict.fromkeys(scaled, 0.0))).series("scale")["tuned"]] == [0.5, 1.0]


def test_medians_of_each_prompt_are_compared_too() -> None:
    a = np.array([1.0, 5.0, 1.0, 0.0, 3.0, 3.0])
    b = np.array([2.0, 2.0, 2.0, 1.0, 1.0, 9.0])
    (one,) = at_equal_settings(scores({HIGH: b, TUNED_HIGH: a}, per=3), "base", draws=100)
    assert per_prompt(a, [0, 0, 0, 1, 1, 1]).tolist() == [1.0, 3.0]
    assert one.median_win is not None and one.median_win.rate == 0.5
    assert one.win.wins == 2 and one.win.n == 6 and one.win.prompts == 2


def test_images_without_a_score_are_left_out_of_both() -> None:
    a, b = np.array([1.0, np.nan, 3.0, 1.0]), np.array([0.0, 0.0, np.nan, 0.0])
    (one,) = at_equal_settings(scores({HIGH: b, TUNED_HIGH: a}), "base")
    assert one.left_out == 2 and one.win.n == 2 and one.win.rate == 1


def test_categories_with_enough_prompts_are_compared_each() -> None:
    values = sample({HIGH: 0.0, TUNED_HIGH: 0.0}, n=40)
    values[TUNED_HIGH] = values[HIGH] + np.where(np.arange(40) < 20, 1.0, -1.0)
    found = by_category(scores(values, categories=["up"] * 20 + ["down"] * 18 + ["few"] * 2), "base")
    assert {one.category: one.win.rate for one in found} == {"up": 1.0, "down": 0.0}


def test_p_values_are_the_sign_test_of_scipy_adjusted_for_the_family() -> None:
    table = scores(sample({LOW: 0.0, HIGH: 0.0, TUNED_LOW: 0.15, TUNED_HIGH: 0.1}))
    family = corrected(at_equal_settings(table, "base"), "holm")
    plain = [reference.binomtest(one.win.wins, one.win.wins + one.win.losses).pvalue for one in family]
    smaller = int(np.argmin(plain))
    assert family[smaller].p_adjusted == pytest.approx(min(2 * plain[smaller], 1))
    assert all(one.p_adjusted >= p - 1e-12 for one, p in zip(family, plain, strict=True))


def test_intervals_cover_the_truth_at_their_nominal_rate_with_several_images_a_prompt() -> None:
    """Prompts differ in how much is won on them, so that images of one prompt are not independent."""
    rng = np.random.default_rng(5)
    covered_rate, covered_mean, claims, rounds = 0, 0, 0, 250
    for _ in range(rounds):
        of_prompt = np.repeat(rng.normal(0.0, 0.5, size=50), 4)
        difference = of_prompt + rng.normal(0.0, 1.0, size=200)
        base = rng.normal(size=200)
        table = scores({HIGH: base, TUNED_HIGH: base + difference}, per=4)
        (one,) = at_equal_settings(table, "base", draws=400)
        covered_rate += one.win.low <= 0.5 <= one.win.high
        covered_mean += one.difference.low <= 0 <= one.difference.high
        claims += one.win.p_value < 0.05
    # Binomial spread of a true 95 % over 250 rounds: 1.4 %.
    assert 0.90 <= covered_rate / rounds <= 0.99
    assert 0.90 <= covered_mean / rounds <= 0.99
    assert claims / rounds <= 0.08


def test_means_of_prompts_leave_out_what_has_no_score() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan])
    assert scores({HIGH: values}, per=2).prompt_means(HIGH).tolist() == [2.0, 5.0]
