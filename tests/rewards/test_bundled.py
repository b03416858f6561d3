"""The bundled judges, loaded by name as any reward."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.rewards.registry import load_reward
from diffalign.shapes.disturb import change_fact
from diffalign.shapes.scene import complete, parse, render, sample_captions


@pytest.fixture(scope="module")
def scenes():  # type: ignore[no-untyped-def]
    """Renders, their captions, and captions with one fact changed."""
    rng = np.random.default_rng(0)
    captions = sample_captions(96, 0, heldout=True)
    pictures = [render(complete(parse(caption), rng)) for caption in captions]
    wrong = [change_fact(parse(caption), rng).caption() for caption in captions]
    return pictures, captions, wrong


@pytest.mark.parametrize(("name", "least"), [("shapes-checker", 0.9), ("shapes-clip", 0.7)])
def test_true_captions_score_higher_than_wrong_ones(name: str, least: float, scenes) -> None:  # type: ignore[no-untyped-def]
    pictures, captions, wrong = scenes
    reward = load_reward(name)
    true, false = (reward(pictures, texts).rewards for texts in (captions, wrong))
    assert (true > false).float().mean() > least


@pytest.mark.parametrize("name", ["shapes-annotator", "shapes-aesthetic"])
def test_scores_are_finite_and_differ(name: str, scenes) -> None:  # type: ignore[no-untyped-def]
    pictures, captions, _ = scenes
    rewards = load_reward(name)(pictures, captions).rewards
    assert rewards.isfinite().all() and rewards.std() > 0.01
