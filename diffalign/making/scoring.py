"""Scores of drawn images, prompt by prompt. They are cached by content, so a stopped run scores nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.data.prompts import Prompt
from diffalign.evaluation.folder import Case, SampleFolder, write_rows
from diffalign.rewards.combine import CombinedRewards, RewardSet

Floats = NDArray[np.float64]
_IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class Scores:
    """Scores of k images, (k,) each; NaN where an image could not be scored.

    Attributes:
        total: what images are ranked by.
        raw: of each scorer by name, as it gave them; also of those that do not count.
        counted: names of the scorers that the total is made of.
    """

    total: Floats
    raw: dict[str, Floats]
    counted: tuple[str, ...]

    def voters(self) -> Floats:
        """Raw scores of those that count, (m, k)."""
        return np.stack([self.raw[name] for name in self.counted])


def score_groups(
    rewards: RewardSet, folder: SampleFolder, groups: Sequence[Sequence[Case]], prompts: Sequence[Prompt]
) -> list[Scores]:
    """Scores of each group of images, in order: running statistics of transforms see them in this order each time.

    Args:
        folder: where the images are.
        groups: the images of each prompt.
        prompts: the prompt, and its metadata, of each group.

    Raises:
        RewardError: an image could not be scored and the policy of ``rewards`` does not bear it.
    """
    found: list[Scores] = []
    size = max(1, _IMAGES_AT_ONCE // max(map(len, groups), default=1))
    try:
        with tqdm(total=len(groups), unit="prompt", desc="scores") as bar:
            for start in range(0, len(groups), size):
                batch = range(start, min(start + size, len(groups)))
                flat = [(case, prompts[i], i) for i in batch for case in groups[i]]
                result = rewards(
                    [folder.image(case) for case, *_ in flat],
                    [case.prompt for case, *_ in flat],
                    [prompt.metadata for _, prompt, _ in flat],
                    group_ids=[i for *_, i in flat],
                )
                found += _by_group(result, rewards, [len(groups[i]) for i in batch])
                bar.update(len(batch))
    finally:
        rewards.close()
    return found


def _by_group(result: CombinedRewards, rewards: RewardSet, sizes: Sequence[int]) -> list[Scores]:
    counted = tuple(member.name for member in rewards.members if not member.eval_only)
    total, raw = _floats(result.total), {name: _floats(output.rewards) for name, output in result.raw.items()}
    ends = np.cumsum(sizes)[:-1]
    parts = {name: np.split(values, ends) for name, values in raw.items()}
    return [
        Scores(own, {name: parts[name][i] for name in parts}, counted) for i, own in enumerate(np.split(total, ends))
    ]


def _floats(values: Tensor) -> Floats:
    return values.detach().double().cpu().numpy()


def write_scores(path: Path, groups: Sequence[Sequence[Case]], scores: Sequence[Scores]) -> None:
    """A row for each image: prompt, seed, file, total and raw scores; null where there is none."""
    rows = [
        {
            "prompt": case.prompt,
            "seed": case.seed,
            "file": case.file,
            "total": _plain(own.total[k]),
            "scores": {name: _plain(values[k]) for name, values in own.raw.items()},
        }
        for group, own in zip(groups, scores, strict=True)
        for k, case in enumerate(group)
    ]
    write_rows(path, rows)


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
