"""Simulated annotators on renders with random mistakes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffalign.shapes import annotators
from diffalign.shapes.annotators import ANNOTATORS, OPPOSITES, View, prefer, rating, utility
from diffalign.shapes.disturb import change_fact, everything, noise
from diffalign.shapes.scene import Placed, Scene, complete, render, sample_spec

CAPTION = "a red circle"
CIRCLE = Placed("circle", "red", "large", 32, 32, 12)


def picture(background: str = "white", **changes: object) -> Image.Image:
    return render(Scene((replace(CIRCLE, **changes),), background))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, View, View]]:
    """Captions with two renders each, half of them with a fact changed or disturbed, as a fair model draws them."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(500):
        spec = sample_spec(rng)
        views = []
        for _ in range(2):
            drawn = change_fact(spec, rng) if rng.random() < 0.5 else spec
            image = render(complete(drawn, rng))
            views.append(View.of(everything(image, rng) if rng.random() < 0.3 else image))
        found.append((spec.caption(), views[0], views[1]))
    return found


def labels(pairs: list[tuple[str, View, View]], user_id: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([prefer(a, b, caption, user_id, rng) for caption, a, b in pairs])


def test_about_ten_percent_are_ties(pairs: list[tuple[str, View, View]]) -> None:
    share = np.mean([(labels(pairs, user) == 0.5).mean() for user in ANNOTATORS])
    assert 0.06 < share < 0.14


def test_choices_repeat_for_the_same_seed_only(pairs: list[tuple[str, View, View]]) -> None:
    assert (labels(pairs, 1) == labels(pairs, 1)).all()
    assert (labels(pairs, 1) != labels(pairs, 1, seed=1)).any()


def test_most_choices_follow_the_utility(pairs: list[tuple[str, View, View]]) -> None:
    differences = np.array([utility(a, caption, 1) - utility(b, caption, 1) for caption, a, b in pairs])
    chosen = labels(pairs, 1)
    decided = chosen != 0.5
    assert 0.8 < ((differences > 0) == (chosen > 0.5))[decided].mean() < 1


def test_opposite_users_agree_less_than_those_who_share_a_taste(pairs: list[tuple[str, View, View]]) -> None:
    def agreement(first: int, second: int) -> float:
        a, b = labels(pairs, first, seed=1), labels(pairs, second, seed=2)
        return float((a == b)[(a != 0.5) & (b != 0.5)].mean())

    assert agreement(*OPPOSITES) < agreement(1, 2) - 0.1


@pytest.mark.parametrize(
    ("liked_by_the_first", "other"),
    [(picture(y=24), picture(y=40)), (picture("white"), picture("black"))],
    ids=["high or low", "light or dark"],
)
def test_opposite_users_disagree_where_the_caption_leaves_it_open(
    liked_by_the_first: Image.Image, other: Image.Image
) -> None:
    first, second = OPPOSITES
    assert utility(liked_by_the_first, CAPTION, first) > utility(other, CAPTION, first) + 1
    assert utility(liked_by_the_first, CAPTION, second) < utility(other, CAPTION, second) - 1
    assert utility(liked_by_the_first, CAPTION) == pytest.approx(utility(other, CAPTION), abs=0.05)


def test_a_stated_background_is_no_matter_of_taste() -> None:
    caption = "a red circle on a white background"
    views = [View.of(picture("white")), View.of(picture("black"))]
    assert {view.light(annotators.parse(caption)) for view in views} == {0.0}


def test_the_common_taste_is_large_and_centred() -> None:
    best = utility(picture(), CAPTION)
    assert best > utility(picture(radius=7.5), CAPTION) + 0.3
    assert best > utility(picture(x=24, y=24), CAPTION) + 0.3
    small = "a small red circle"
    assert utility(picture(radius=7.5), small) > utility(picture(), small)


def test_faithful_and_clean_pictures_have_more_utility() -> None:
    rng = np.random.default_rng(0)
    best = utility(picture(), CAPTION)
    assert best > utility(picture(color="blue"), CAPTION) + 2
    assert best > utility(noise(picture(), rng), CAPTION) + 1


def test_rating_needs_no_caption_and_stays_in_its_range() -> None:
    rng = np.random.default_rng(0)
    empty = Image.new("RGB", (64, 64), (245, 245, 245))
    dirty = noise(picture(radius=7.5, x=24, y=24), rng, sigma=40)
    assert 1 <= rating(dirty) < rating(picture(radius=7.5)) < rating(picture()) <= 10
    assert 1 <= rating(empty) < rating(picture())


def test_unknown_user_is_named() -> None:
    with pytest.raises(ValueError, match="user_id 9; there are 1, 2, 3, 4, 5, 6"):
        utility(picture(), CAPTION, 9)
