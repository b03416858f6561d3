"""From images of a rollout to rewards, and from rewards of all processes to advantages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign.data.prompts import Prompt
from diffalign.errors import DiffalignError, UserError
from diffalign.rewards.base import RewardOutput
from diffalign.rewards.combine import CombinedRewards, RewardSet, load_rewards
from diffalign.rewards.failures import FailurePolicy
from diffalign.training.advantages import (
    PromptStatTracker,
    Scale,
    batch_advantages,
    combined_advantages,
    zero_variance_groups,
)
from diffalign.training.groups import Draws
from diffalign.training.online_config import JudgedConfig, OnlineConfig

_THUMBNAIL = 16


@dataclass
class Scored:
    """What is known of N images of one process.

    Attributes:
        raw: each reward's own scores, (N,) float32 on the CPU; NaN where there is none. Held-out ones too.
        thumbnails: small copies of the images, (N, 3 * 16 * 16), to measure how much a group's images differ.
        flat: images of one colour all over, bool (N,).
        seconds: spent in rewards.
        total: combined reward, (N,), set by :meth:`RolloutScorer.weigh`.
        advantages, weight: (N,), set there too; the weight is 0 for images that do not count, and 1 on average over
            the rollout.
        stats: of the whole rollout, over all processes, set there too.
    """

    raw: dict[str, Tensor]
    thumbnails: Tensor
    flat: Tensor
    seconds: float
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    weight: Tensor = field(default_factory=lambda: torch.zeros(0))
    stats: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def cat(parts: Sequence[Scored]) -> Scored:
        """The images of several, in order."""
        return Scored(
            raw={name: torch.cat([part.raw[name] for part in parts]) for name in parts[0].raw},
            thumbnails=torch.cat([part.thumbnails for part in parts]),
            flat=torch.cat([part.flat for part in parts]),
            seconds=sum(part.seconds for part in parts),
        )


class Scorer:
    """The rewards of a run: those it trains on, and those that only judge.

    Raises:
        UserError: no such reward, or none to train on.
    """

    def __init__(self, config: JudgedConfig, accelerator: Accelerator) -> None:
        self.combine, self.accelerator = config.combine, accelerator
        self.rewards = load_rewards(
            config.rewards,
            mode=config.combine,
            device=accelerator.device,
            policy=FailurePolicy(on_failure=config.on_reward_failure),
        )
        trained = [m for m in self.rewards.members if not m.eval_only]
        self.weights = {m.name: m.weight for m in trained}
        self.judges = [m.name for m in self.rewards.members if m.eval_only]
        # Held-out rewards cost time and are not for training: images to train on are scored without them.
        self.training_rewards = RewardSet(trained, mode=config.combine, policy=self.rewards.policy)

    def check(self, prompts: Sequence[Prompt], source: str) -> None:
        """Raise a UserError where a reward cannot judge a prompt, or a prompt lacks metadata that one needs."""
        self.rewards.check_prompts([prompt.text for prompt in prompts])
        for reward in self.rewards.rewards:
            for index, prompt in enumerate(prompts):
                missing = [key for key in reward.required_metadata if key not in prompt.metadata]
                if missing:
                    raise UserError(
                        f"the reward {reward.name} needs {', '.join(missing)} with every prompt, and prompt {index} "
                        f"of {source} ({prompt.text!r:.80}) has none. JSONL: "
                        f'{{"prompt": ..., "{missing[0]}": ...}}; or a table with that column.'
                    )

    def judge(self, images: Tensor, prompts: Sequence[Prompt], groups: Sequence[int]) -> Tensor:
        """Scores of images by every reward, held-out ones too, in the order of ``rewards.names``: (B, rewards)."""
        texts, rows = [p.text for p in prompts], [p.metadata for p in prompts]
        raw = self.rewards.score(images, texts, rows, group_ids=groups)
        return torch.stack([raw[name].rewards.double().cpu() for name in self.rewards.names], 1)

    def total(self, raw: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Tensor:
        """The trained reward of images whose scores are known, leaving running statistics as they are: (N,)."""
        outputs = _outputs({name: raw[name] for name in self.weights})
        rows = [p.metadata for p in prompts]
        groups = list(range(len(rows)))
        return self.training_rewards.combined(outputs, rows, group_ids=groups, update=False).total

    def describe(self) -> str:
        """The rewards in one line."""
        weights = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        return f"{self.combine} of {weights}"

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as JSON knows it."""
        return self.training_rewards.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read back what :meth:`state_dict` gave."""
        self.training_rewards.load_state_dict(state)


class RolloutScorer(Scorer):
    """Turns scores of rollouts into advantages.

    Images are scored where they are drawn; rewards are combined on the scores of all processes, which are the same
    everywhere, and so are running statistics.

    Args:
        whole_groups: each process draws whole groups, as rewards that judge a group need.

    Raises:
        UserError: a group-wise reward where groups are split over processes or batches.
    """

    def __init__(self, config: OnlineConfig, accelerator: Accelerator, *, whole_groups: bool) -> None:
        super().__init__(config, accelerator)
        self.config = config
        judges = [m.name for m in self.rewards.members if m.reward.mode == "groupwise"]
        if judges and not (whole_groups and not config.rollout_batch_size % config.num_images_per_prompt):
            raise UserError(
                f"the reward {judges[0]} judges a group as a whole: make rollout_batch_size a multiple of "
                "num_images_per_prompt, and num_prompts_per_rollout one of num_updates_per_rollout x processes"
            )

    def score(self, images: Tensor, prompts: Sequence[Prompt], groups: Tensor) -> Scored:
        """Score a batch of images.

        Args:
            images: (B, 3, H, W) in [0, 1], float32, CPU.
            prompts: of each.
            groups: int64 (B,).
        """
        start = time.perf_counter()
        raw = self.training_rewards.score(
            images, [p.text for p in prompts], [p.metadata for p in prompts], group_ids=groups.tolist()
        )
        seconds = time.perf_counter() - start
        pixels = images.flatten(2)
        return Scored(
            raw={name: output.rewards.float().cpu() for name, output in raw.items()},
            thumbnails=interpolate(images, size=(_THUMBNAIL, _THUMBNAIL), mode="area").flatten(1),
            flat=(pixels.amax(2) - pixels.amin(2)).amax(1) < 1 / 255,
            seconds=seconds,
        )

    def weigh(self, draws: Draws, scored: Scored, tracker: PromptStatTracker, prompts: Sequence[Prompt]) -> None:
        """Combine the rewards over all processes and set ``total``, ``advantages``, ``weight`` and ``stats``.

        Args:
            draws, scored: of this process; the rest comes from the others.
            tracker: used and updated where ``advantage`` is "tracker".
            prompts: of the source.

        Raises:
            DiffalignError: hardly an image has a reward.
        """
        whole = self._gather(draws, scored)
        groups = whole["group"].long()
        combined = self._combine(whole, [prompts[i] for i in whole["prompt"].long().tolist()])
        total = combined.total.cpu().float()
        valid = torch.isfinite(total)
        if valid.float().mean() < 0.5:
            raise DiffalignError(
                f"only {int(valid.sum())} of {len(total)} images of this rollout have a reward: nothing to learn from"
            )
        dead = torch.isin(groups, zero_variance_groups(total, groups))
        counts = (valid & ~dead if self.config.advantage in ("group", "global_std") else valid).float()
        clip = self.config.advantage_clip
        scored.total = total[draws.place]
        scored.advantages = self._advantages(combined, whole, tracker).clamp(-clip, clip)[draws.place]
        scored.weight = (counts / counts.mean().clamp(min=1e-6))[draws.place]
        scored.stats = self._stats(whole, total, dead)

    def _combine(self, whole: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> CombinedRewards:
        raw = _outputs({name: whole[f"raw/{name}"] for name in self.weights})
        rows = [p.metadata for p in prompts]
        return self.training_rewards.combined(raw, rows, group_ids=whole["group"].long().tolist())

    def _advantages(
        self, combined: CombinedRewards, whole: Mapping[str, Tensor], tracker: PromptStatTracker
    ) -> Tensor:
        kind, groups = self.config.advantage, whole["group"].long()
        rewards, weights = {"": combined.total.cpu().float()}, {"": 1.0}
        if self.config.combine == "sum" and self.config.normalise_each_reward and len(self.weights) > 1:
            rewards, weights = {name: combined.transformed[name].cpu() for name in self.weights}, self.weights
        if kind in ("group", "global_std"):
            scale: Scale = "group" if kind == "group" else "global"
            return combined_advantages(rewards, weights, groups, scale=scale)
        prompts = whole["prompt"].long().tolist()

        def of_one(name: str, values: Tensor) -> Tensor:
            if kind == "batch":
                return batch_advantages(values)
            return tracker.update([f"{prompt} {name}".strip() for prompt in prompts], values)

        return torch.stack([weights[name] * of_one(name, values) for name, values in rewards.items()]).sum(0)

    def _gather(self, draws: Draws, scored: Scored) -> dict[str, Tensor]:
        """Columns of the whole rollout, each (images,) float64, in the order of place, on every process."""
        columns: dict[str, Tensor] = {
            "place": draws.place,
            "group": draws.groups,
            "prompt": draws.prompts,
            "flat": scored.flat,
            **{f"raw/{name}": values for name, values in scored.raw.items()},
        }
        # Float64 holds every integer here exactly.
        local = torch.stack([column.double() for column in columns.values()], 1).to(self.accelerator.device)
        table: Tensor = self.accelerator.gather(local).cpu()
        order = table[:, 0].argsort()
        whole = dict(zip(columns, table[order].unbind(1), strict=True))
        # A group may be drawn by several processes, so its images are compared after they are brought together.
        small: Tensor = self.accelerator.gather(scored.thumbnails.to(self.accelerator.device)).cpu()
        whole["distance"] = within_group_distance(small[order], whole["group"])
        return whole

    def _stats(self, whole: Mapping[str, Tensor], total: Tensor, dead: Tensor) -> dict[str, float]:
        stats = {
            "reward": _mean(total),
            "reward_std": _std(total),
            "flat_images": _mean(whole["flat"]),
            "failed_images": 1 - _mean(torch.isfinite(total).double()),
        }
        if self.config.num_images_per_prompt > 1:
            stats["zero_variance_groups"] = len(whole["group"][dead].unique()) / len(whole["group"].unique())
            stats["group_distance"] = _mean(whole["distance"])
        for name in self.weights:
            values = whole[f"raw/{name}"]
            stats |= {f"reward/{name}": _mean(values), f"reward_std/{name}": _std(values)}
        return stats


def within_group_distance(features: Tensor, groups: Tensor) -> Tensor:
    """Root mean squared distance of each image to the others of its group: (N, D) and (N,) to (N,), 0 for one alone.

    Falls towards 0 as the images of a prompt become one image.
    """
    result = torch.zeros(len(features))
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        members = features[rows].float()
        if len(members) > 1:
            squared = torch.cdist(members, members).square() / features.shape[1]
            result[rows] = (squared.sum(1) / (len(members) - 1)).sqrt()
    return result


def pad_and_gather(accelerator: Accelerator, places: Sequence[int], rows: Tensor, count: int) -> Tensor:
    """Rows that the processes hold, each at its place, on every process: (M, K) here to (count, K), float64, CPU."""
    table = torch.zeros(count, rows.shape[1], dtype=torch.float64)
    table[list(places)] = rows.double()
    result: Tensor = accelerator.reduce(table.to(accelerator.device), "sum")
    return result.cpu()


def _outputs(raw: Mapping[str, Tensor]) -> dict[str, RewardOutput]:
    return {name: RewardOutput(values.float(), valid=torch.isfinite(values)) for name, values in raw.items()}


def _mean(values: Tensor) -> float:
    kept = values[torch.isfinite(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def _std(values: Tensor) -> float:
    kept = values[torch.isfinite(values)]
    return float(kept.std(correction=0)) if len(kept) else float("nan")
