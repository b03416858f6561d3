from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from diffalign.errors import UserError
from diffalign.trainers.reward.config import RewardTrainingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_config": {"projection_dim": 8}}, "needs from_scratch"),
        ({"from_scratch": True}, "needs train_mode full"),
        ({"train_mode": "full", "head_hidden": 8}, "need train_mode head"),
        ({"random_flip": True}, "computes the embeddings once"),
        ({"objective": "rao_kupper", "tie_constant": 1.0}, "tie_constant must be above 1"),
        ({"validation_share": 0.0}, "validation_share must be in"),
        ({"validation_share": 0.6, "heldout_share": 0.4}, "leave prompts to train on"),
        ({"train_mode": "lora", "rank": 0}, "rank must be at least 1"),
        ({"eval_steps": 0}, "eval_steps must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(
    reward_config: Callable[..., RewardTrainingConfig], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reward_config(**settings)


def test_a_heldout_split_leaves_its_share_alone(reward_config: Callable[..., RewardTrainingConfig]) -> None:
    assert reward_config(heldout_split="heldout", validation_share=0.9, heldout_share=0.5).heldout_split == "heldout"
