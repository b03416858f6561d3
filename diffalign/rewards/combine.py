"""Several rewards as one: a list in YAML, each scored, transformed, kept apart and combined.

rewards:
  - shapes-checker
  - {reward: pickscore, weight: 0.5, transform: zscore}
  - {reward: aesthetic:head.pth, transform: {kind: cap, at: 7}, eval_only: true, options: {batch_size: 8}}

scores = load_rewards(config.rewards, mode="sum", device="cuda")(images, prompts)
scores.total, scores.raw["pickscore"].rewards, scores.transformed["pickscore"]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.config.fields import from_dict
from diffalign.config.files import parse_yaml
from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.ensembles import Mode
from diffalign.rewards.failures import FailurePolicy
from diffalign.rewards.registry import load_reward
from diffalign.rewards.reward_set import CombinedRewards, Member, RewardSet
from diffalign.rewards.score_cache import CachedReward, ScoreCache
from diffalign.rewards.transforms import LSC, parse_transforms

__all__ = ["CombinedRewards", "Member", "RewardSet", "RewardSpec", "load_rewards"]


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a list, as YAML says it.

    Attributes:
        reward: a name, ``NAME:CHECKPOINT``, ``package.module:Class`` or ``path/to/file.py:Class``.
        name: how it is logged; the reward's own by default.
        weight: what it counts in the total.
        transform: what is done to its scores first, see :mod:`diffalign.rewards.transforms`; None for nothing.
        eval_only: scored and logged, but not part of the total: a judge that training does not see.
        options: of the reward's constructor.
    """

    reward: str
    name: str | None = None
    weight: float = 1.0
    transform: Any = None
    eval_only: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | RewardSpec, where: str = "rewards") -> RewardSpec:
        """From an item of the list; a text in braces, as on a command line, is read as YAML.

        Raises:
            UserError: an unknown key, with the nearest known one, or no reward.
        """
        if isinstance(value, RewardSpec):
            return value
        if isinstance(value, str) and value.startswith("{"):
            value = parse_yaml(value, where)
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: a reward is a name or a mapping with reward:, got {value!r}")
        if "reward" not in value:
            raise UserError(f"{where}: the mapping {dict(value)!r} does not say which reward: add reward: NAME")
        return from_dict(cls, value, where)


def load_rewards(
    rewards: Iterable[str | Mapping[str, Any] | RewardSpec],
    *,
    mode: Mode = "sum",
    uncertainty: float = 1.0,
    policy: FailurePolicy | None = None,
    cache: ScoreCache | None = None,
    folder: str | Path | None = None,
    pool: dict[str, Reward] | None = None,
    where: str = "rewards",
    **options: Any,
) -> RewardSet:
    """The rewards of a list as one set; models load with the first images.

    Args:
        rewards: each a name or a mapping with the fields of :class:`RewardSpec`.
        mode: see :func:`diffalign.rewards.ensembles.combine`. In "lsc" a reward without a transform of that kind gets
            ``lsc`` with its running mean as the reference.
        uncertainty: lambda of the modes "mean_std" and "uwo".
        policy: for images that cannot be scored.
        cache: keep scores there, and look there first.
        folder: of the config file: ``file.py:Class`` is looked for there first, then in the working directory.
        pool: scorers made so far; give one dictionary to two lists (of training and of evaluation) to share them.
        where: the start of errors, such as the config file's name.
        options: for every reward, such as device, dtype; those of a spec win.

    Raises:
        UserError: an unknown key, reward, transform or mode, with what is near.
    """
    pool = {} if pool is None else pool
    members = []
    for index, item in enumerate(rewards):
        place = f"{where}[{index}]"
        spec = RewardSpec.of(item, place)
        reward = _shared(spec, {**options, **spec.options}, folder, pool, cache)
        transforms = parse_transforms(spec.transform, place)
        if mode == "lsc" and not spec.eval_only and not any(isinstance(t, LSC) for t in transforms):
            transforms.append(LSC())
        members.append(Member(spec.name or reward.name, reward, spec.weight, transforms, spec.eval_only))
    return RewardSet(members, mode=mode, uncertainty=uncertainty, policy=policy)


def _shared(
    spec: RewardSpec,
    options: Mapping[str, Any],
    folder: str | Path | None,
    pool: dict[str, Reward],
    cache: ScoreCache | None,
) -> Reward:
    """The scorer of a spec; the same one for equal specs, since a second copy of a model is a waste of memory."""
    place = _beside(spec.reward, folder)
    key = repr((place, sorted((name, repr(value)) for name, value in options.items() if value is not None)))
    if key not in pool:
        reward = load_reward(place, **options)
        pool[key] = reward if cache is None else CachedReward(reward, cache)
    return pool[key]


def _beside(reward: str, folder: str | Path | None) -> str:
    """``file.py:Class`` with the file looked for in ``folder`` first; anything else as it is."""
    file, colon, attribute = reward.rpartition(":")
    if folder is None or not colon or not file.endswith(".py"):
        return reward
    beside = Path(folder) / Path(file).expanduser()
    return f"{beside}:{attribute}" if beside.is_file() else reward
