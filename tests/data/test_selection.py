from __future__ import annotations

import numpy as np
import pytest

from diffalign.data.selection import (
    POINTS,
    Choice,
    agreed,
    agreement,
    all_pairs,
    capped,
    easiest,
    nearest,
    pair_at,
    spread,
    wide_enough,
)

CARD = [0.10, 0.35, 0.42, 0.50, 0.55, 0.61, 0.70, 0.93]


def test_the_numbers_of_the_card() -> None:
    assert np.mean(CARD) == pytest.approx(0.52)
    assert spread(CARD) == pytest.approx(0.230543, abs=1e-6)
    assert np.mean(CARD) - 2 * spread(CARD) == pytest.approx(0.058914, abs=1e-6)
    assert pair_at(CARD, "max", "mu-2s") == Choice(7, 0, pytest.approx(0.83))
    assert pair_at(CARD, "max", "min") == pair_at(CARD, "max", "mu-2s")


def test_of_many_images_the_one_at_mu_minus_two_sigma_is_not_the_worst() -> None:
    scores = np.random.default_rng(0).normal(size=400)
    pair = pair_at(scores, "max", "mu-2s")
    assert pair is not None and pair.rejected != int(scores.argmin())
    target = scores.mean() - 2 * scores.std()
    assert abs(scores[pair.rejected] - target) == np.abs(scores - target).min()


def test_every_point_is_the_nearest_score() -> None:
    values = np.array(CARD)
    for point, sigmas in POINTS.items():
        index = nearest(CARD, point)  # type: ignore[arg-type]
        assert index == int(np.abs(values - (values.mean() + sigmas * values.std())).argmin())
    with pytest.raises(ValueError, match="mu-3s"):
        nearest(CARD, "mu-3s")  # type: ignore[arg-type]


def test_what_does_not_differ_makes_no_pair() -> None:
    assert pair_at([0.5, 0.5, 0.5]) is None
    assert pair_at([0.5]) is None
    assert pair_at([]) is None
    assert pair_at([1.0, 2.0], "min", "max") is None
    assert all_pairs([0.5, 0.5]) == []


def test_an_image_without_a_score_is_never_chosen() -> None:
    scores = [np.nan, 0.2, 0.9, np.nan, 0.1]
    assert pair_at(scores) == Choice(2, 4, pytest.approx(0.8))
    assert all(0 not in (c.chosen, c.rejected) and 3 not in (c.chosen, c.rejected) for c in all_pairs(scores))
    assert len(all_pairs(scores)) == 3
    assert pair_at([np.nan, np.nan]) is None


def test_shift_and_scale_change_no_choice() -> None:
    for points in (("max", "min"), ("max", "mu-2s"), ("mu+s", "mu-s")):
        first, second = pair_at(CARD, *points), pair_at([3 + 7 * s for s in CARD], *points)  # type: ignore[arg-type]
        assert first is not None and second is not None
        assert (first.chosen, first.rejected) == (second.chosen, second.rejected)


def test_margins_in_both_units() -> None:
    pairs = all_pairs(CARD)
    assert [c.gap for c in wide_enough(pairs, CARD, 0.5)] == pytest.approx([0.83, 0.6, 0.58, 0.51, 0.51])
    assert len(wide_enough(pairs, CARD, 0)) == len(pairs) == 28
    sigma = spread(CARD)
    assert wide_enough(pairs, CARD, 2.5, "sigma") == [c for c in pairs if c.gap >= 2.5 * sigma]
    assert wide_enough(pairs, CARD, 0.83) == pairs[:1] and wide_enough(pairs, CARD, 0.8301) == []


def test_agreement_counts_scorers() -> None:
    by_scorer = [[0.1, 0.9], [0.2, 0.3], [0.8, 0.1], [0.5, 0.5]]
    forth, back = Choice(1, 0, 0.8), Choice(0, 1, 0.7)
    assert agreement(forth, by_scorer) == 2 and agreement(back, by_scorer) == 1
    assert agreed([forth, back], by_scorer, 2) == [forth]
    assert agreed([forth, back], by_scorer, 3) == []
    with pytest.raises(ValueError, match="5 scorers"):
        agreed([forth], by_scorer, 5)


def test_a_cap_keeps_the_widest() -> None:
    choices = [Choice(0, 1, 0.1), Choice(2, 3, 0.9), Choice(4, 5, 0.5)]
    assert capped(choices, 2) == choices[1:]
    assert capped(choices, None) == capped(choices, 3) == choices


def test_the_easiest_come_first() -> None:
    assert easiest([0.9, 0.1, 0.5, 0.1], 0.5).tolist() == [1, 3]
    assert easiest([0.9, 0.1, 0.5, 0.1], 1).tolist() == [1, 3, 2, 0]
    assert easiest([0.9, 0.1], 0.01).tolist() == [1]
    for share in (0, 1.1, -1):
        with pytest.raises(ValueError, match="share"):
            easiest([0.1], share)
    with pytest.raises(ValueError, match="pair 1"):
        easiest([0.1, float("nan")], 0.5)
