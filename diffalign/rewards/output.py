"""What a reward returns: scores that are finite or marked as missing, with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import DiffalignError


class RewardError(DiffalignError):
    """A reward could not score an image, or returned what is no score."""


@dataclass
class RewardOutput:
    """Scores of N images.

    Attributes:
        rewards: (N,) float32; NaN where ``valid`` is False.
        details: further values of each image by name, (N,) or (N, K) float32.
        valid: (N,) bool; left out, all are.
        messages: for each image why it has no score, or None; left out, all None.
    """

    rewards: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)
    valid: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))
    messages: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.rewards) and not len(self.valid):
            self.valid = torch.ones(len(self.rewards), dtype=torch.bool, device=self.rewards.device)
        if not self.messages:
            self.messages = [None] * len(self.rewards)


Scores: TypeAlias = Tensor | tuple[Tensor, Mapping[str, Tensor]] | RewardOutput
"""What ``score`` may return."""


def as_output(result: Scores, count: int, name: str, device: torch.device) -> RewardOutput:
    """What a reward returned for ``count`` images, checked; NaN and a message where there is no score.

    Raises:
        RewardError: scores or details of another number, on another device than ``device`` or the CPU, or no numbers.
    """
    scores: Any
    details: Mapping[str, Any]
    valid, messages = None, None
    if isinstance(result, RewardOutput):
        scores, details, valid, messages = result.rewards, result.details, result.valid, result.messages
    else:
        scores, details = result if isinstance(result, tuple) else (result, {})
    rewards = _as_tensor(scores, name)
    if rewards.shape != (count,):
        raise RewardError(
            f"the reward {name} returned scores of shape {tuple(rewards.shape)} for {count} images; "
            f"expected ({count},)"
        )
    values = {key: _as_tensor(value, name) for key, value in details.items()}
    for key, value in values.items():
        if value.shape[:1] != (count,):
            raise RewardError(f"the reward {name} returned {key!r} for {len(value)} of {count} images")
    for value in (rewards, *values.values()):
        _check_device(value, device, name)
    if valid is None or messages is None:
        return RewardOutput(rewards, values)
    if valid.shape != (count,) or len(messages) != count:
        raise RewardError(
            f"the reward {name} returned {tuple(valid.shape)} marks of validity and {len(messages)} messages for "
            f"{count} images"
        )
    valid = valid.to(rewards.device, torch.bool)
    reasons = [None if ok else (text or "no reason given") for ok, text in zip(valid.tolist(), messages, strict=True)]
    return RewardOutput(rewards.masked_fill(~valid, float("nan")), values, valid, reasons)


def _as_tensor(values: Any, name: str) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(np.asarray(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise RewardError(f"the reward {name} returned {values!r:.80}, which are no scores: {error}") from error
    return values.float()


def _check_device(values: Tensor, device: torch.device, name: str) -> None:
    given = values.device
    if given.type == "cpu" or (given.type == device.type and device.index in (None, given.index)):
        return
    raise RewardError(f"the reward {name} runs on {device} but returned scores on {given}")


def merge(parts: list[RewardOutput], order: list[int], target: torch.device, name: str) -> RewardOutput:
    """The outputs of batches as one, images in the order of the call."""
    names = set(parts[0].details)
    for part in parts:
        if set(part.details) != names:
            raise RewardError(f"the reward {name} returned details {sorted(part.details)} after {sorted(names)}")
    back = torch.tensor(order).argsort()

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat([value.to(target) for value in values])[back.to(target)]

    messages = [message for part in parts for message in part.messages]
    return RewardOutput(
        joined([part.rewards for part in parts]),
        {key: joined([part.details[key] for part in parts]) for key in parts[0].details},
        joined([part.valid for part in parts]),
        [messages[i] for i in back.tolist()],
    )
