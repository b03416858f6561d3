"""Which images a rollout holds, in which update each is trained on, and which process draws it.

A rollout is ``num_prompts_per_rollout`` groups of ``num_images_per_prompt`` images, over all processes. Its groups are
cut into ``num_updates_per_rollout`` equal shares, one for each optimiser step, and each share's images are cut into
equal parts, one for each process. So the images of a step are the same for every number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.random import key_seed, keyed_permutation
from diffalign.errors import UserError


@dataclass(frozen=True)
class Arithmetic:
    """The sizes of a rollout.

    Attributes:
        groups: prompts of a rollout, over all processes.
        images_per_group: images of each prompt.
        updates: optimiser steps that a rollout's images are cut into.
        epochs: how often each of these is taken.
        micro_batch: images of a process in one forward pass of training.
        passes_per_image: forward passes of training for each image (trained sampling steps, or timesteps).
        world_size: processes.
    """

    groups: int
    images_per_group: int
    updates: int
    epochs: int
    micro_batch: int
    passes_per_image: int
    world_size: int

    @property
    def images(self) -> int:
        """Images of a rollout, over all processes."""
        return self.groups * self.images_per_group

    @property
    def images_per_step(self) -> int:
        """Images of an optimiser step, over all processes."""
        return self.images // self.updates

    @property
    def steps_per_rollout(self) -> int:
        return self.updates * self.epochs

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a process in one optimiser step."""
        return self.images_per_step // self.world_size // self.micro_batch * self.passes_per_image

    def check(self) -> None:
        """Raise a UserError where the numbers do not go into each other, with the nearest that do."""
        if self.groups % self.updates:
            raise UserError(
                f"num_prompts_per_rollout {self.groups} cannot be cut into num_updates_per_rollout {self.updates} "
                f"equal shares: use num_prompts_per_rollout {self._nearest()}."
            )
        if self.images_per_step % (self.world_size * self.micro_batch):
            whole = not self.images_per_step % self.world_size
            batch = f", or train_batch_size {self._largest_divisor()}" if whole else ""
            raise UserError(
                f"{self.images_per_step} images per update ({self.groups} prompts x {self.images_per_group} images / "
                f"{self.updates} updates) cannot be cut into micro-batches of {self.micro_batch} on {self.world_size} "
                f"process(es). Use num_prompts_per_rollout {self._nearest()}{batch}."
            )

    def _nearest(self) -> int:
        """The number of prompts nearest to the one asked for that goes into everything; of two, the larger."""
        unit = self.world_size * self.micro_batch
        # An update has a multiple of unit / gcd(unit, images of a prompt) prompts.
        step = self.updates * (unit // math.gcd(unit, self.images_per_group))
        return max(1, (2 * self.groups + step) // (2 * step)) * step

    def _largest_divisor(self) -> int:
        """The largest micro-batch up to the one asked for that the images of an update can be cut into."""
        images = self.images_per_step // self.world_size
        return next(size for size in range(min(self.micro_batch, images), 0, -1) if not images % size)

    def whole_groups(self) -> bool:
        """Whether every group's images are drawn by one process, as rewards that judge a group as a whole need."""
        return (self.groups // self.updates) % self.world_size == 0


@dataclass(frozen=True)
class Draws:
    """What a process draws in a rollout, in the order of training: row i of N.

    Attributes:
        prompts: index of each image's prompt in the source, int64 (N,).
        groups: id of each image's group, unique in the run, int64 (N,).
        seeds: of each image, int64 (N,).
        place: position of each image in the whole rollout, over all processes, int64 (N,).
    """

    prompts: Tensor
    groups: Tensor
    seeds: Tensor
    place: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


class PromptOrder:
    """Which prompt is drawn at each place of a run: each pass over them in an order of its own, none left out.

    Args:
        prompts: how many the source has.
        seed: of the run.
    """

    def __init__(self, prompts: int, seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self._pass: tuple[int, Tensor] | None = None

    def __getitem__(self, place: int) -> int:
        number, position = divmod(place, self.prompts)
        if self._pass is None or self._pass[0] != number:
            self._pass = number, keyed_permutation(self.prompts, self.seed, "prompts", number)
        return int(self._pass[1][position])


class GroupOrder:
    """The rollouts of a run: a pure function of the rollout's number.

    Args:
        prompts: how many prompts the source has.
        seed: of the run.
        arithmetic: sizes of a rollout.
    """

    def __init__(self, prompts: int, seed: int, arithmetic: Arithmetic) -> None:
        self.order, self.seed, self.arithmetic = PromptOrder(prompts, seed), seed, arithmetic

    def draws(self, rollout: int, rank: int) -> Draws:
        """What process ``rank`` draws in rollout number ``rollout``."""
        a = self.arithmetic
        place = torch.arange(a.images).reshape(a.updates, a.world_size, -1)[:, rank].flatten()
        groups = rollout * a.groups + place // a.images_per_group
        member = place % a.images_per_group
        seeds = [key_seed(self.seed, "image", g, m) for g, m in zip(groups.tolist(), member.tolist(), strict=True)]
        prompt_of = [self.order[int(group)] for group in groups]
        return Draws(torch.tensor(prompt_of), groups, torch.tensor(seeds), place)

    def share(self, draws: Draws, update: int) -> Tensor:
        """Rows of a process's draws that update number ``update`` of the rollout trains on, int64."""
        size = len(draws) // self.arithmetic.updates
        return torch.arange(update * size, (update + 1) * size)


def trained_steps(stochastic: list[int], count: int | None, choose: Callable[[int], Tensor]) -> list[int]:
    """Which sampling steps of a rollout are trained on: all that have a density, or ``count`` of them.

    Args:
        stochastic: steps that have a density.
        count: how many; None for all.
        choose: n -> a permutation of n, keyed by the rollout.
    """
    if count is None or count >= len(stochastic):
        return stochastic
    return sorted(stochastic[i] for i in choose(len(stochastic))[:count].tolist())
