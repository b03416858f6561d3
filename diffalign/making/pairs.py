"""``diffalign pairs``: preference pairs of a model's own samples, chosen by rewards.

Draw k images of each prompt, score them, choose, write. Images and scores are kept in the folder: another choice, or a
smaller k, makes another file of the same images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState

from diffalign.config import field, to_dict
from diffalign.data.prompts import Prompt, read_prompts
from diffalign.data.selection import Choice, Point, agreed, all_pairs, capped, pair_at, wide_enough
from diffalign.data.write import PairRow, write_pairs
from diffalign.errors import UserError
from diffalign.evaluation.folder import Case, SampleFolder
from diffalign.evaluation.sampling import Drawer, SampleConfig, plan
from diffalign.making.scoring import Scores, score_groups, write_scores
from diffalign.making.settings import hold_to
from diffalign.rewards.combine import Member, RewardSet, load_rewards
from diffalign.rewards.failures import FailurePolicy
from diffalign.rewards.score_cache import ScoreCache

SELECTIONS: dict[str, tuple[Point, Point]] = {"best-worst": ("max", "min"), "best-sigma": ("max", "mu-2s")}


@dataclass(kw_only=True)
class SelectionConfig:
    """Which of a prompt's images become pairs."""

    rewards: list[Any] = field(
        help="What images are ranked by: names, package.module:Class, file.py:Class, or {reward: NAME, weight: 0.5}."
    )
    combine: str = field("sum", help="How several rewards become one, see docs/combining-rewards.md.")
    select: Literal["best-worst", "best-sigma", "all"] = field(
        "best-sigma",
        help="The best against the worst; the best against the one nearest to the mean minus two standard deviations; "
        "or all pairs of different scores.",
    )
    margin: float = field(0.0, help="Leave out pairs that differ by less than this.")
    margin_unit: Literal["absolute", "sigma"] = field(
        "absolute", help="Unit of the margin: of the total score, or the standard deviation of a prompt's images."
    )
    agree: int = field(1, help="Leave out pairs on which fewer scorers than this agree.")
    max_pairs_per_prompt: int | None = field(None, help="At most so many pairs of a prompt, those that differ most.")
    reward_device: str | None = field(None, help="Device of the scorers. Default: the best there is.")
    on_failure: Literal["stop", "retry", "drop"] = field(
        "stop", help="Where an image cannot be scored: stop, try again, or leave it out and count it."
    )

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError(f"margin must be 0 or more, got {self.margin}")
        limit = self.max_pairs_per_prompt
        if limit is not None and limit < 1:
            raise UserError(f"max_pairs_per_prompt must be at least 1, got {limit}")
        if not 1 <= self.agree <= len(self.rewards):
            raise UserError(f"agree must be from 1 to the number of rewards ({len(self.rewards)}), got {self.agree}")

    def load_rewards(self, cache: Path) -> RewardSet:
        """The rewards of the config, which remember in the folder ``cache`` what they scored."""
        return load_rewards(
            self.rewards,
            mode=self.combine,  # type: ignore[arg-type]
            policy=FailurePolicy(self.on_failure),
            cache=ScoreCache(cache),
            device=self.reward_device,
        )

    def choose(self, scores: Scores) -> list[Choice]:
        """The pairs among one prompt's images."""
        if self.select == "all":
            choices = all_pairs(scores.total)
        else:
            choice = pair_at(scores.total, *SELECTIONS[self.select])
            choices = [choice] if choice else []
        choices = wide_enough(choices, scores.total, self.margin, self.margin_unit)
        choices = agreed(choices, scores.voters(), self.agree)
        return capped(choices, self.max_pairs_per_prompt)


@dataclass(kw_only=True)
class PairsConfig(SelectionConfig, SampleConfig):
    """Make preference pairs of a model's own samples.

    The result is <output_dir>/<split>.parquet for --dataset_name. A run that was stopped goes on; another selection or
    fewer images a prompt, under another --split, uses the images that are there.
    """

    num_images_per_prompt: int = field(8, help="Images for each prompt, from which pairs are chosen.")
    split: str = field("train", help="Name of the file of pairs, without .parquet.")

    def __post_init__(self) -> None:
        SampleConfig.__post_init__(self)
        SelectionConfig.__post_init__(self)
        images = len(self.seeds) if self.seeds is not None else self.num_images_per_prompt
        if images < 2:
            raise UserError(f"a pair needs two images of a prompt, but num_images_per_prompt is {images}")
        if Path(self.split).name != self.split:
            raise UserError(f"split is the name of a file, not a path: {self.split!r}")


def run_pairs(config: PairsConfig) -> Path:
    """Draw, score and choose what a config asks for, and return the parquet file.

    Raises:
        UserError: a setting is wrong, or the folder holds other images or other pairs of that name.
        RewardError: an image could not be scored.
    """
    root = Path(config.output_dir)
    path = root / f"{config.split}.parquet"
    source = config.prompts or config.prompts_file
    if not source:
        raise UserError("no prompts: give --prompts_file FILE (or shapes-train), or --prompts 'a prompt' ...")
    prompts = read_prompts(source, limit=config.max_prompts)
    groups = _groups(prompts, config)
    rewards = config.load_rewards(root / "scores")
    rewards.check_prompts([prompt.text for prompt in prompts])
    drawer = Drawer(config)
    cases = [case for group in groups for case in group]
    folder = drawer.draw(config.spec(), cases, root / "samples")
    drawer.release()
    if PartialState().is_main_process:
        _check_selection(config, rewards, folder, cases, path)
        scores = score_groups(rewards, folder, groups, prompts)
        write_scores(path.with_suffix(".scores.jsonl"), groups, scores)
        report = choose_and_write(path, folder, groups, scores, config, name=config.spec().name)
        for line in report:
            print(line)
        print(path)
    PartialState().wait_for_everyone()
    return path


def _groups(prompts: Sequence[Prompt], config: SampleConfig) -> list[list[Case]]:
    cases = plan(
        [prompt.text for prompt in prompts],
        seeds=config.seeds,
        seed=config.seed,
        num_images_per_prompt=config.num_images_per_prompt,
    )
    size = len(cases) // len(prompts)
    return [cases[start : start + size] for start in range(0, len(cases), size)]


def _check_selection(
    config: PairsConfig, rewards: RewardSet, folder: SampleFolder, cases: Sequence[Case], path: Path
) -> None:
    """Refuse to replace pairs of another selection; remember this one."""
    names = ("combine", "select", "margin", "margin_unit", "agree", "max_pairs_per_prompt")
    chosen = {name: getattr(config, name) for name in names}
    chosen |= {"rewards": [_describe(member) for member in rewards.members], "images": folder.settings}
    chosen["seeds"] = [case.seed for case in cases]
    remedy = "Give these pairs another name with --split NAME: images and scores are shared."
    overwrite = config.overwrite_output_dir or not path.exists()
    hold_to(path.with_suffix(".selection.json"), chosen, remedy, overwrite=overwrite)


def _describe(member: Member) -> list[Any]:
    transforms = [{"kind": transform.kind, **to_dict(transform)} for transform in member.transforms]
    return [member.name, member.reward.identity, member.weight, transforms, member.eval_only]


def choose_and_write(
    path: Path,
    folder: SampleFolder,
    groups: Sequence[Sequence[Case]],
    scores: Sequence[Scores],
    config: SelectionConfig,
    name: str,
) -> list[str]:
    """Choose among each group and write the pairs; returns lines for people.

    Args:
        path: the parquet file; replaced.
        name: what drew the images, for the columns ``model_0`` and ``model_1``.

    Raises:
        UserError: no prompt gave a pair.
    """
    choices = [config.choose(group) for group in scores]
    report = _report(choices, scores)
    if not any(choices):
        raise UserError("; ".join(report) + ". Lower margin and agree, or draw more images a prompt.")
    write_pairs(path, _rows(folder, groups, scores, choices, config, name), overwrite=True)
    return report


def _rows(
    folder: SampleFolder,
    groups: Sequence[Sequence[Case]],
    scores: Sequence[Scores],
    choices: Sequence[Sequence[Choice]],
    config: SelectionConfig,
    name: str,
) -> Iterator[PairRow]:
    for group, own, chosen in zip(groups, scores, choices, strict=True):
        for choice in chosen:
            first, second = group[choice.chosen], group[choice.rejected]
            yield PairRow(
                caption=first.prompt,
                jpg_0=(folder.path / first.file).read_bytes(),
                jpg_1=(folder.path / second.file).read_bytes(),
                label_0=1.0,
                id=f"{first.index}-{first.seed}-{second.seed}",
                margin=choice.gap,
                score_0=float(own.total[choice.chosen]),
                score_1=float(own.total[choice.rejected]),
                scores={k: (float(v[choice.chosen]), float(v[choice.rejected])) for k, v in own.raw.items()},
                seed_0=first.seed,
                seed_1=second.seed,
                model_0=name,
                model_1=name,
                source=f"{config.select} of {len(group)}",
            )


def _report(choices: Sequence[Sequence[Choice]], scores: Sequence[Scores]) -> list[str]:
    pairs = [choice for group in choices for choice in group]
    totals = np.concatenate([group.total for group in scores])
    missing = int(np.isnan(totals).sum())
    lines = [
        f"{len(pairs)} pairs of {len(choices)} prompts with {len(totals)} images",
        f"{sum(not group for group in choices)} prompts without a pair",
        f"mean score {np.nanmean(totals):.4g}; within a prompt, spread {_mean_spread(scores):.4g}",
    ]
    if pairs:
        gaps = np.array([choice.gap for choice in pairs])
        lines.append(f"chosen minus rejected: mean {gaps.mean():.4g}, smallest {gaps.min():.4g}")
    if missing:
        lines.append(f"{missing} images have no score and were left out")
    return lines


def _mean_spread(scores: Sequence[Scores]) -> float:
    return float(np.mean([np.nanstd(group.total) for group in scores]))
