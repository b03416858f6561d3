"""Scores of drawn images, kept prompt by prompt, so that a run that was stopped scores nothing twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from diffalign.config.files import parse_yaml
from diffalign.data.prompts import Prompt
from diffalign.errors import UserError
from diffalign.evaluation.folder import Case, SampleFolder
from diffalign.making.ledger import Ledger
from diffalign.rewards.base import Reward
from diffalign.rewards.failures import FailureLedger, FailurePolicy, guarded
from diffalign.rewards.registry import load_reward

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
_IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class Scores:
    """Scores of k images: by scorer and in total, (k,) each; NaN where an image could not be scored."""

    total: Floats
    raw: dict[str, Floats]

    def part(self, rows: slice) -> Scores:
        """The scores of some of the images."""
        return Scores(self.total[rows], {name: values[rows] for name, values in self.raw.items()})


class Scorer:
    """Several rewards and their weighted sum.

    Args:
        rewards: each a name (or anything :func:`diffalign.rewards.registry.load_reward` takes), or a mapping with
            ``reward`` and perhaps ``name``, ``weight`` and ``options``.
        device: of the rewards.
        policy: for images that cannot be scored.

    Raises:
        UserError: no reward, two of one name, or an unknown key.
    """

    def __init__(
        self,
        rewards: Sequence[str | Mapping[str, Any]],
        *,
        device: str | None = None,
        policy: FailurePolicy | None = None,
    ) -> None:
        if not rewards:
            raise UserError("no reward to choose by: give --rewards NAME ...")
        self.policy, self.failures = policy or FailurePolicy(), FailureLedger()
        self.rewards: dict[str, tuple[Reward, float]] = {}
        for entry in rewards:
            # A word of the command line may stand for a mapping.
            given: Any = parse_yaml(entry, "rewards") if isinstance(entry, str) and entry.startswith("{") else entry
            spec: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"reward": given}
            reward = load_reward(spec.pop("reward"), device=device, **spec.pop("options", {}))
            name, weight = str(spec.pop("name", reward.name)), float(spec.pop("weight", 1.0))
            if spec:
                raise UserError(f"rewards: unknown key {next(iter(spec))!r}; known are reward, name, weight, options")
            if name in self.rewards:
                raise UserError(f"two rewards are called {name!r}; give one of them another `name`")
            self.rewards[name] = (reward, weight)

    @property
    def identity(self) -> list[list[Any]]:
        """What decides the scores, for the settings they are stored with."""
        return [[name, reward.identity, weight] for name, (reward, weight) in self.rewards.items()]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts that a reward cannot judge, before any image is drawn."""
        for reward, _ in self.rewards.values():
            reward.check_prompts(prompts)

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        group_ids: Sequence[int],
    ) -> Scores:
        """Score N images; those with one group id are of one prompt."""
        raw: dict[str, Floats] = {}
        for name, (reward, _) in self.rewards.items():
            output = guarded(
                reward,
                list(images),
                list(prompts),
                list(metadata),
                group_ids=list(group_ids),
                policy=self.policy,
                ledger=self.failures,
            )
            raw[name] = output.rewards.double().cpu().numpy()
        total = np.sum([weight * raw[name] for name, (_, weight) in self.rewards.items()], axis=0)
        return Scores(total, raw)

    def close(self) -> None:
        """Let the models go."""
        for reward, _ in self.rewards.values():
            reward.close()


def score_groups(
    scorer: Scorer, folder: SampleFolder, groups: Sequence[Sequence[Case]], prompts: Sequence[Prompt], place: Path
) -> list[Scores]:
    """Scores of each group, from the ledger in ``place`` where they are there.

    Args:
        folder: where the images are.
        groups: the images of each prompt.
        prompts: the prompt (and its metadata) of each group.

    Raises:
        RewardError: an image could not be scored and the scorer's policy does not bear it.
    """
    settings = {"rewards": scorer.identity, "images": folder.settings}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
    ledger = Ledger(place, f"scores-{digest}", settings)
    ledger.open()
    todo = [i for i, group in enumerate(groups) if _key(group) not in ledger]
    try:
        with tqdm(total=len(groups), initial=len(groups) - len(todo), unit="prompt", desc="scores") as bar:
            size = max(1, _IMAGES_AT_ONCE // max(map(len, groups), default=1))
            for start in range(0, len(todo), size):
                batch = todo[start : start + size]
                _score_batch(scorer, folder, [(groups[i], prompts[i]) for i in batch], ledger)
                bar.update(len(batch))
    finally:
        scorer.close()
    return [_read(ledger[_key(group)]) for group in groups]


def _score_batch(
    scorer: Scorer, folder: SampleFolder, batch: Sequence[tuple[Sequence[Case], Prompt]], ledger: Ledger
) -> None:
    flat = [(case, prompt, number) for number, (group, prompt) in enumerate(batch) for case in group]
    scores = scorer(
        [folder.image(case) for case, *_ in flat],
        [case.prompt for case, *_ in flat],
        [prompt.metadata for _, prompt, _ in flat],
        [number for *_, number in flat],
    )
    start = 0
    for group, _ in batch:
        own = scores.part(slice(start, start + len(group)))
        start += len(group)
        values = {"total": _plain(own.total), "raw": {name: _plain(row) for name, row in own.raw.items()}}
        ledger.add(_key(group), values)


def _key(group: Sequence[Case]) -> str:
    seeds = hashlib.blake2b(repr([case.seed for case in group]).encode(), digest_size=6).hexdigest()
    return f"{group[0].index} {len(group)} {seeds} {group[0].prompt}"


def _plain(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _read(value: Mapping[str, Any]) -> Scores:
    return Scores(_floats(value["total"]), {name: _floats(row) for name, row in value["raw"].items()})


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)
