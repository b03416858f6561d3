"""Advantages against values worked out by hand, and what must not matter."""

from __future__ import annotations

import pytest
import torch

from diffalign.training.advantages import (
    PromptStatTracker,
    batch_advantages,
    combined_advantages,
    group_advantages,
    zero_variance_groups,
)


def test_batch_advantages() -> None:
    assert batch_advantages(torch.tensor([1.0, 2, 4])).tolist() == pytest.approx(
        [-1.06904497, -0.26726124, 1.33630621], abs=1e-6
    )


def test_each_group_is_centred_and_scaled_on_its_own() -> None:
    rewards, groups = torch.tensor([1.0, 10, 2, 30, 3, 20]), torch.tensor([7, 3, 7, 3, 7, 3])
    advantages = group_advantages(rewards, groups, eps=0)
    assert advantages.tolist() == pytest.approx([-1.224745, -1.224745, 0, 1.224745, 1.224745, 0], abs=1e-5)


def test_global_scale_divides_every_group_by_the_spread_of_all_rewards() -> None:
    rewards, groups = torch.tensor([0.0, 2, 10, 12]), torch.tensor([0, 0, 1, 1])
    std = rewards.std(correction=0).item()
    assert group_advantages(rewards, groups, scale="global", eps=0).tolist() == pytest.approx(
        [-1 / std, 1 / std, -1 / std, 1 / std]
    )


def test_a_group_of_identical_rewards_has_no_advantage_and_is_named() -> None:
    rewards, groups = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0]), torch.tensor([5, 5, 5, 6, 6])
    for eps in (0.0, 1e-8):
        assert group_advantages(rewards, groups, eps=max(eps, 1e-12))[:3].tolist() == [0, 0, 0]
    assert zero_variance_groups(rewards, groups).tolist() == [5]


def test_an_image_without_a_reward_moves_nobody() -> None:
    nan = float("nan")
    with_hole = group_advantages(torch.tensor([1.0, nan, 3.0]), torch.tensor([0, 0, 0]))
    without = group_advantages(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
    assert with_hole.tolist() == pytest.approx([without[0].item(), 0, without[1].item()])


def test_rewards_are_normalised_before_they_are_added() -> None:
    groups = torch.zeros(3, dtype=torch.int64)
    rewards = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([10.0, 0, 5])}
    weights = {"a": 1.0, "b": 1.0}
    combined = combined_advantages(rewards, weights, groups, eps=0)
    assert combined.tolist() == pytest.approx([0, -1.224745, 1.224745], abs=1e-5)
    stretched = {"a": rewards["a"] * 100 - 3, "b": rewards["b"]}
    assert torch.allclose(combined_advantages(stretched, weights, groups, eps=0), combined, atol=1e-6)


def test_the_tracker_judges_by_the_rollout_until_it_knows_a_prompt() -> None:
    tracker = PromptStatTracker(buffer_size=4, min_count=3)
    first = tracker.update(["a", "a", "b"], torch.tensor([1.0, 3, 8]), eps=0)
    rollout = torch.tensor([1.0, 3, 8])
    expected = (rollout - rollout.mean()) / rollout.std(correction=0)
    assert first.tolist() == pytest.approx(expected.tolist())
    second = tracker.update(["a", "b"], torch.tensor([5.0, 2]), eps=0)
    own = torch.tensor([1.0, 3, 5])
    assert second[0].item() == pytest.approx(((5 - own.mean()) / own.std(correction=0)).item())


def test_the_tracker_forgets_the_oldest_and_resumes_exactly() -> None:
    tracker = PromptStatTracker(buffer_size=2, min_count=1)
    tracker.update(["a", "a", "a"], torch.tensor([1.0, 2, 3]))
    assert tracker.state_dict() == {"a": [2.0, 3.0]}
    again = PromptStatTracker(buffer_size=2, min_count=1)
    again.load_state_dict(tracker.state_dict())
    rewards = torch.tensor([0.5, 7.0])
    assert torch.equal(again.update(["a", "b"], rewards), tracker.update(["a", "b"], rewards))
