from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from diffalign.rewards import load_reward
from diffalign.rewards.diversity import Diversity, mean_distances, vendi_score
from diffalign.rewards.score_cache import CachedReward, ScoreCache

X = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def test_vendi_score_by_hand() -> None:
    assert vendi_score(X).item() == pytest.approx(2.828427, abs=1e-6)
    assert vendi_score(torch.ones(5, 3)).item() == pytest.approx(1.0)
    assert vendi_score(torch.eye(6)).item() == pytest.approx(6.0)


def test_orders_of_the_vendi_score_fall_and_meet_at_one() -> None:
    values = [vendi_score(X, q).item() for q in (0.5, 1.0, 2.0, math.inf)]
    assert values == sorted(values, reverse=True)
    assert vendi_score(X, 1.0001).item() == pytest.approx(values[1], abs=1e-3)


def test_mean_distances_by_hand() -> None:
    assert 1 - mean_distances(X).mean().item() == pytest.approx(0.235702, abs=1e-6)


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in ("red", "red", "blue", "red", "white")]


def test_images_of_one_prompt_are_compared_with_each_other_only() -> None:
    reward = load_reward(Diversity, checkpoint="shapes-clip")
    output = reward(pictures(), group_ids=[0, 0, 1, 1, 2])
    assert output.rewards[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert output.details["vendi"][:2].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    assert output.rewards[2] == output.rewards[3] > 0.01
    assert output.details["vendi"][2] > 1.01
    assert output.valid.tolist() == [True] * 4 + [False]
    assert "no other image" in str(output.messages[4])


def test_kept_scores_of_a_group_are_used_again(tmp_path: object) -> None:
    cache = ScoreCache(str(tmp_path))
    images, groups = pictures()[:4], [0, 0, 1, 1]
    first = CachedReward(Diversity("shapes-clip"), cache)(images, group_ids=groups)
    again = CachedReward(Diversity("shapes-clip"), cache)(images, group_ids=groups)
    assert cache.hits["diversity"] == 4
    assert torch.equal(first.details["vendi"], again.details["vendi"])
