"""Reward models: what scores an image, and how such models are trained.

    reward = load_reward("pickscore", device="cuda")
    scores = reward(images, prompts).rewards

Names are imported on first use, because they need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.rewards.base import Reward, RewardCard, RewardError, RewardOutput
    from diffalign.rewards.combine import RewardSpec, load_rewards
    from diffalign.rewards.failures import FailureLedger, FailurePolicy, guarded
    from diffalign.rewards.registry import load_reward, register
    from diffalign.rewards.reward_set import CombinedRewards, RewardSet
    from diffalign.rewards.score_cache import CachedReward, ScoreCache

_EXPORTS = {
    "CachedReward": "score_cache",
    "CombinedRewards": "reward_set",
    "FailureLedger": "failures",
    "FailurePolicy": "failures",
    "Reward": "base",
    "RewardCard": "base",
    "RewardError": "base",
    "RewardOutput": "base",
    "RewardSet": "reward_set",
    "RewardSpec": "combine",
    "ScoreCache": "score_cache",
    "guarded": "failures",
    "load_reward": "registry",
    "load_rewards": "combine",
    "register": "registry",
}

__all__ = [
    "CachedReward",
    "CombinedRewards",
    "FailureLedger",
    "FailurePolicy",
    "Reward",
    "RewardCard",
    "RewardError",
    "RewardOutput",
    "RewardSet",
    "RewardSpec",
    "ScoreCache",
    "guarded",
    "load_reward",
    "load_rewards",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
