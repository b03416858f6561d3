"""From scores of a rollout to advantages and to what is watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.data.prompts import Prompt
from diffalign.errors import DiffalignError
from diffalign.training.advantages import PromptStatTracker, batch_advantages
from diffalign.training.groups import Draws
from diffalign.training.online_config import OnlineConfig
from diffalign.training.scoring import RolloutScorer, Scored, within_group_distance

REWARDS = """
def narrow(images, prompts, metadata):
    return images[:, 0].flatten(1).mean(1)

def wide(images, prompts, metadata):
    return 1000 * images[:, 1].flatten(1).mean(1)
"""
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
NARROW, WIDE = [0.1, 0.2, 0.6, 0.4, 0.4, 0.7], [300.0, 100.0, 200.0, 0.0, 500.0, 250.0]
KINDS = ("group", "global_std", "tracker", "batch")


@pytest.fixture
def scorer(tmp_path: Path) -> Callable[..., RolloutScorer]:
    """Makes one of one process; keyword arguments are of the config."""
    (tmp_path / "rewards.py").write_text(REWARDS)

    def make(**own: Any) -> RolloutScorer:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": "none",
            "output_dir": "none",
            "prompts": "none",
            "rewards": [f"{tmp_path}/rewards.py:narrow", f"{tmp_path}/rewards.py:wide"],
            "max_train_steps": 8,
        }
        alone: Any = SimpleNamespace(device=torch.device("cpu"), gather=lambda values: values)
        return RolloutScorer(OnlineConfig(**{**settings, **own}), alone, whole_groups=True)

    return make


def weighed(scorer: RolloutScorer, *columns: list[float], tracker: PromptStatTracker | None = None) -> Scored:
    count = len(columns[0])
    raw = {name: torch.tensor(values) for name, values in zip(scorer.weights, columns, strict=True)}
    scored = Scored(raw, torch.zeros(count, 3), torch.zeros(count, dtype=torch.bool), 0.0)
    draws = Draws(GROUPS, GROUPS, torch.arange(count), torch.arange(count))
    scorer.weigh(draws, scored, tracker or PromptStatTracker(8, 2), [Prompt("a"), Prompt("b")])
    return scored


@pytest.mark.parametrize("kind", KINDS)
def test_the_unit_of_a_reward_has_no_say_in_what_it_counts(kind: str, scorer: Callable[..., RolloutScorer]) -> None:
    each = weighed(scorer(advantage=kind), NARROW, WIDE).advantages
    tiny = [value / 1000 for value in WIDE]
    assert torch.allclose(weighed(scorer(advantage=kind), NARROW, tiny).advantages, each, atol=0.02)
    total = scorer(advantage=kind, normalise_each_reward=False)
    of_sum, alone = weighed(total, NARROW, WIDE).advantages, weighed(total, [0.0] * 6, WIDE).advantages
    assert torch.allclose(of_sum, alone, atol=0.01) and not torch.allclose(each, alone, atol=0.1)


def test_running_statistics_are_of_each_reward_and_prompt(scorer: Callable[..., RolloutScorer]) -> None:
    tracker = PromptStatTracker(8, 3)
    weighed(scorer(advantage="tracker"), NARROW, WIDE, tracker=tracker)
    kept = tracker.state_dict()
    assert len(kept) == 4 and all(len(values) == 3 for values in kept.values())
    alone = PromptStatTracker(8, 3)
    found = weighed(scorer(advantage="tracker", normalise_each_reward=False), NARROW, WIDE, tracker=alone)
    assert set(alone.state_dict()) == {"0", "1"}
    assert found.advantages[:3].tolist() == pytest.approx(
        batch_advantages(torch.tensor(NARROW[:3]) + torch.tensor(WIDE[:3])).tolist(), abs=1e-4
    )


def test_groups_without_a_difference_are_left_out_and_the_others_count_for_them(
    scorer: Callable[..., RolloutScorer],
) -> None:
    flat = weighed(scorer(), [0.5, 0.5, 0.5, *NARROW[3:]], [100.0, 100.0, 100.0, *WIDE[3:]])
    assert flat.weight.tolist() == [0, 0, 0, 2, 2, 2]
    assert flat.advantages[:3].tolist() == [0, 0, 0]
    assert flat.stats["zero_variance_groups"] == 0.5
    kept = weighed(scorer(advantage="batch"), [0.5, 0.5, 0.5, *NARROW[3:]], [100.0, 100.0, 100.0, *WIDE[3:]])
    assert kept.weight.tolist() == [1] * 6


def test_images_without_a_reward_do_not_count_and_too_many_end_the_run(scorer: Callable[..., RolloutScorer]) -> None:
    nan = float("nan")
    hole = weighed(scorer(), [*NARROW[:5], nan], WIDE)
    assert hole.weight[5] == 0 and hole.weight.mean().item() == pytest.approx(1)
    assert hole.stats["failed_images"] == pytest.approx(1 / 6)
    with pytest.raises(DiffalignError, match="only 2 of 6 images"):
        weighed(scorer(), [*NARROW[:2], nan, nan, nan, nan], WIDE)


def test_means_and_spreads_of_each_reward_and_the_clip(scorer: Callable[..., RolloutScorer]) -> None:
    own = scorer(advantage_clip=0.5)
    narrow, wide = own.weights
    found = weighed(own, NARROW, WIDE)
    assert found.stats[f"reward/{narrow}"] == pytest.approx(0.4)
    assert found.stats[f"reward_std/{wide}"] == pytest.approx(torch.tensor(WIDE).std(correction=0).item())
    assert found.advantages.abs().max() == 0.5


def test_black_and_one_coloured_images_are_counted(scorer: Callable[..., RolloutScorer]) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[0] = 0
    images[1] = torch.tensor([0.2, 0.9, 0.4]).reshape(3, 1, 1)
    images[2, :, 5, 5] = 0
    images[2] = images[2].clamp(max=0.5)
    scored = scorer().score(images, [Prompt("a")] * 4, torch.zeros(4, dtype=torch.int64))
    assert scored.flat.tolist() == [True, True, False, False]


def test_diversity_is_the_distance_within_a_group() -> None:
    def of(*values: float) -> Tensor:
        return torch.tensor(values).reshape(-1, 1).expand(-1, 12)

    assert within_group_distance(of(0.5, 0.5, 0.5), torch.zeros(3).long()).tolist() == [0, 0, 0]
    # Another group's images play no part, and one alone has nothing to be far from.
    found = within_group_distance(of(0.0, 0.6, 9.0, 0.0), torch.tensor([0, 0, 1, 0]))
    assert found.tolist() == pytest.approx([(0.36 / 2) ** 0.5, 0.6, 0, (0.36 / 2) ** 0.5], abs=1e-5)
