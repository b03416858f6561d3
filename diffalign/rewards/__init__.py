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
    from diffalign.rewards.registry import load_reward, register

_EXPORTS = {
    "Reward": "base",
    "RewardCard": "base",
    "RewardError": "base",
    "RewardOutput": "base",
    "load_reward": "registry",
    "register": "registry",
}

__all__ = ["Reward", "RewardCard", "RewardError", "RewardOutput", "load_reward", "register"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
