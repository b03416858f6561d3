"""Rewards that score the same images: each kept apart, transformed, and all combined into one total."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.base import GroupIds, Images, Metadata, Reward, RewardOutput
from diffalign.rewards.ensembles import MODES, UNWEIGHTED, Mode, combine
from diffalign.rewards.failures import FailureLedger, FailurePolicy, guarded
from diffalign.rewards.inputs import as_group_ids, as_rows
from diffalign.rewards.statistics import correlation
from diffalign.rewards.transforms import Context, Gather, Transform, apply

logger = logging.getLogger(__name__)

_REMEMBERED = 1024
"""Images whose raw scores are kept for the correlations."""


@dataclass
class Member:
    """A reward of a set, with what is done to its scores."""

    name: str
    reward: Reward
    weight: float = 1.0
    transforms: list[Transform] = field(default_factory=list)
    eval_only: bool = False


@dataclass
class CombinedRewards:
    """Scores of N images by all rewards of a set.

    Attributes:
        total: (N,) float32; NaN where a reward that is part of it has no score.
        raw: what each reward returned, by its name.
        transformed: (N,) of each reward, by its name.
        valid: (N,) bool: there is a total.
        messages: for each image why it has no total, or None.
    """

    total: Tensor
    raw: dict[str, RewardOutput]
    transformed: dict[str, Tensor]
    valid: Tensor
    messages: list[str | None]

    def metrics(self, group_ids: GroupIds | None = None) -> dict[str, float]:
        """Numbers to log: mean and spread of the total, "reward/mean", and of each raw reward, "reward/NAME/mean".

        With ``group_ids`` also ``group_std``, the mean spread within groups, which is what a policy gradient works
        with, and ``flat_groups``, the share of groups that have none.
        """
        values = {"reward": self.total, **{f"reward/{name}": output.rewards for name, output in self.raw.items()}}
        return {
            f"{name}/{key}": number
            for name, scores in values.items()
            for key, number in _spread(scores.detach().double().cpu(), group_ids).items()
        }


class RewardSet:
    """Rewards that score together. Made by :func:`diffalign.rewards.combine.load_rewards`, or of members of one's own.

    Args:
        members: names must differ.
        mode: see :func:`diffalign.rewards.ensembles.combine`.
        uncertainty: lambda of the modes "mean_std" and "uwo".
        policy: for images that cannot be scored; stop by default.

    Raises:
        UserError: an unknown mode, names given twice, no member that trains, weights that have no meaning.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        mode: Mode = "sum",
        uncertainty: float = 1.0,
        policy: FailurePolicy | None = None,
    ) -> None:
        _check_members(members, mode)
        self.members = list(members)
        self.mode: Mode = mode
        self.uncertainty = uncertainty
        self.policy = policy or FailurePolicy()
        self.ledger = FailureLedger()
        self._recent: deque[list[float]] = deque(maxlen=_REMEMBERED)

    @property
    def names(self) -> list[str]:
        """Of all members, in order."""
        return [member.name for member in self.members]

    @property
    def differentiable(self) -> bool:
        """Whether a gradient can pass through the total."""
        return self.mode != "vote" and all(m.reward.differentiable for m in self.members if not m.eval_only)

    @property
    def rewards(self) -> list[Reward]:
        """The scorers, each once however many members share it."""
        return list({id(member.reward): member.reward for member in self.members}.values())

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts that a reward cannot judge."""
        for reward in self.rewards:
            reward.check_prompts(prompts)

    def to(self, device: torch.device | str) -> RewardSet:
        """Move all models. Returns self."""
        for reward in self.rewards:
            reward.to(device)
        return self

    def close(self) -> None:
        """Let all models go; they are loaded again when next needed."""
        for reward in self.rewards:
            reward.close()

    def __call__(
        self,
        images: Images,
        prompts: Sequence[str] | str | None = None,
        metadata: Metadata | None = None,
        *,
        group_ids: GroupIds | None = None,
        grad: bool = False,
        update: bool = True,
        gather: Gather | None = None,
    ) -> CombinedRewards:
        """Score N images with every reward and combine.

        Args:
            images, prompts, metadata, group_ids: as of :meth:`diffalign.rewards.base.Reward.__call__`.
            grad: keep the gradient of the total with respect to the images.
            update: take the scores into running statistics; False to look without leaving a trace.
            gather: makes one list of all processes' lists (``accelerate.utils.gather_object``), so that running
                statistics are the same everywhere. Every process must then make the same calls.

        Raises:
            TypeError: ``grad`` where a reward, or the mode, has no gradient.
            RewardError, UserError: as of :func:`diffalign.rewards.failures.guarded`, under this set's policy.
        """
        rows = as_rows(metadata, len(images), "set", ())
        groups = as_group_ids(group_ids, len(images), "set", needed=self.mode == "vote")
        raw = self.score(images, prompts, rows, group_ids=groups, grad=grad)
        return self.combined(raw, rows, group_ids=groups, update=update, gather=gather)

    def score(
        self,
        images: Images,
        prompts: Sequence[str] | str | None = None,
        metadata: Metadata | None = None,
        *,
        group_ids: GroupIds | None = None,
        grad: bool = False,
    ) -> dict[str, RewardOutput]:
        """The first half of a call: what each reward returns, by its member's name. Arguments as of a call."""
        if grad and not self.differentiable:
            stuck = [m.name for m in self.members if not m.eval_only and not m.reward.differentiable]
            raise TypeError(f"no gradient can pass through {', '.join(stuck) or f'the mode {self.mode}'}")
        rows = as_rows(metadata, len(images), "set", ())
        return self._score(images, prompts, rows, as_group_ids(group_ids, len(images), "set", needed=False), grad)

    def combined(
        self,
        raw: dict[str, RewardOutput],
        metadata: Metadata,
        *,
        group_ids: GroupIds | None = None,
        update: bool = True,
        gather: Gather | None = None,
    ) -> CombinedRewards:
        """The second half: transform what :meth:`score` gave, for these images or for all processes', and combine."""
        rows = list(metadata)
        groups = as_group_ids(group_ids, len(rows), "set", needed=self.mode == "vote")
        transformed: dict[str, Tensor] = {}
        for member in self.members:
            context = Context(member.name, rows, update, gather)
            with torch.no_grad() if member.eval_only else nullcontext():
                transformed[member.name] = apply(member.transforms, raw[member.name].rewards, context)
        if update:
            self._recent += torch.stack([raw[name].rewards.detach() for name in self.names], dim=1).cpu().tolist()
        return self._combined(raw, transformed, groups)

    def _score(
        self, images: Images, prompts: Any, rows: Metadata, groups: list[int] | None, grad: bool
    ) -> dict[str, RewardOutput]:
        """What each reward returned by its member's name; one that members share is asked once."""
        done: dict[tuple[int, bool], RewardOutput] = {}
        for member in self.members:
            key = (id(member.reward), grad and not member.eval_only)
            if key not in done:
                done[key] = guarded(
                    member.reward,
                    images,
                    prompts,
                    rows,
                    group_ids=groups,
                    policy=self.policy,
                    ledger=self.ledger,
                    grad=key[1],
                )
        return {m.name: done[id(m.reward), grad and not m.eval_only] for m in self.members}

    def _combined(
        self, raw: dict[str, RewardOutput], transformed: dict[str, Tensor], groups: list[int] | None
    ) -> CombinedRewards:
        counted = [member for member in self.members if not member.eval_only]
        outputs = [raw[member.name] for member in counted]
        values = torch.stack([transformed[member.name] for member in counted])
        weights = torch.tensor([member.weight for member in counted], dtype=torch.float32, device=values.device)
        ids = None if groups is None else torch.tensor(groups, dtype=torch.int64, device=values.device)
        total = combine(values, weights, self.mode, uncertainty=self.uncertainty, group_ids=ids)
        valid = torch.stack([output.valid for output in outputs]).all(0)
        messages = [
            next((f"{m.name}: {o.messages[i]}" for m, o in zip(counted, outputs, strict=True) if o.messages[i]), None)
            for i in range(len(total))
        ]
        return CombinedRewards(total.masked_fill(~valid, torch.nan), raw, transformed, valid, messages)

    def correlations(self) -> dict[str, dict[str, float]]:
        """How far the raw rewards agree, by "A ~ B": see :func:`diffalign.rewards.statistics.correlation`.

        Over the last 1024 images that this process has scored.
        """
        columns = list(zip(*self._recent, strict=True)) or [()] * len(self.members)
        return {
            f"{self.names[i]} ~ {self.names[j]}": correlation(columns[i], columns[j])
            for i, j in combinations(range(len(self.members)), 2)
        }

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as JSON knows it: running statistics, failures counted, scores remembered."""
        return {
            "transforms": {m.name: [{"kind": t.kind, **t.state_dict()} for t in m.transforms] for m in self.members},
            "failures": self.ledger.state_dict(),
            "names": self.names,
            "recent": [[value if math.isfinite(value) else None for value in row] for row in self._recent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave. A reward that is new starts afresh, with a warning.

        Raises:
            UserError: a reward of the same name has other transforms than it had.
        """
        for member in self.members:
            if member.name not in state["transforms"]:
                logger.warning("the reward %s was not there before: its statistics start afresh", member.name)
                continue
            parts, kinds = state["transforms"][member.name], [transform.kind for transform in member.transforms]
            if [part["kind"] for part in parts] != kinds:
                raise UserError(
                    f"the reward {member.name} had the transforms {[part['kind'] for part in parts]} and now has "
                    f"{kinds}: resume with what it had, or give it another name to start afresh"
                )
            for transform, part in zip(member.transforms, parts, strict=True):
                transform.load_state_dict(part)
        self.ledger.load_state_dict(state["failures"])
        if state["names"] == self.names:
            rows = [[math.nan if value is None else value for value in row] for row in state["recent"]]
            self._recent = deque(rows, maxlen=_REMEMBERED)


def _check_members(members: Sequence[Member], mode: str) -> None:
    if mode not in MODES:
        raise UserError(f"there is no mode {mode!r}.{did_you_mean(mode, MODES)} Choose one of {', '.join(MODES)}.")
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rewards are named {name!r}: give one of them another name:")
    if all(member.eval_only for member in members):
        raise UserError("no reward is part of the total" + (": all are eval_only" if names else ": the list is empty"))
    for member in members:
        if not math.isfinite(member.weight):
            raise UserError(f"the weight of {member.name} is {member.weight}")
        if member.eval_only or mode in ("sum", "lsc"):
            continue
        if mode in UNWEIGHTED and member.weight != 1:
            raise UserError(
                f"the weight {member.weight:g} of {member.name} has no meaning in the mode {mode}; bring rewards to "
                "one scale by transform: {kind: affine, scale: ...} or zscore"
            )
        if member.weight <= 0:
            raise UserError(f"the weight of {member.name} must be above 0 in the mode {mode}, got {member.weight:g}")


def _spread(scores: Tensor, group_ids: GroupIds | None) -> dict[str, float]:
    """Mean, std and the like of (N,) scores; empty where none is known."""
    known = scores.isfinite()
    if not known.any():
        return {}
    numbers = {"mean": scores[known].mean().item(), "std": scores[known].std(correction=0).item()}
    if group_ids is None:
        return numbers
    groups = torch.as_tensor(group_ids).cpu()
    kept = [scores[known & (groups == group)] for group in groups.unique()]
    stds = [0.0 if (part == part[0]).all() else part.std(correction=0).item() for part in kept if len(part) > 1]
    if stds:
        numbers["group_std"] = sum(stds) / len(stds)
        numbers["flat_groups"] = stds.count(0.0) / len(stds)
    return numbers
