"""Noising the images of a rollout again, for objectives on the forward process: AWM, NFT, reward-weighted regression.

They need of a rollout the clean latents alone, so any sampler will do, and each image is trained on at T timesteps
with fresh noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.noise import NoiseProcess
from diffalign.diffusion.random import keyed_noise, keyed_uniform
from diffalign.diffusion.steps import Steps
from diffalign.training.online import OnlineBatch

Timesteps = Literal["stratified", "rollout"]


@dataclass(frozen=True)
class Renoised:
    """B images at one timestep.

    Attributes:
        x_t: noised latents, (B, C, h, w).
        timesteps: (B,), all equal.
        target: what the network should predict, (B, C, h, w).
        sigma: noise level of the timestep in [0, 1].
    """

    x_t: Tensor
    timesteps: Tensor
    target: Tensor
    sigma: float


def renoise(
    process: NoiseProcess, batch: OnlineBatch, steps: Steps, count: int, choice: Timesteps, seed: int
) -> Renoised:
    """Noise a batch for its pass number ``batch.use[2]`` of ``count``.

    Args:
        process: of the model.
        batch: images of a rollout.
        steps: those they were drawn with.
        count: T, the passes over each image.
        choice: "stratified": one timestep in each of T equal parts of the training distribution; "rollout": one in
            each of T equal parts of the sampler's own timesteps, without the first (pure noise) and the last tenth,
            as in the code of AWM's authors.
        seed: of the run.
    """
    number, epoch, use = batch.use
    # One timestep for all images and processes, so that advantages are compared at equal noise.
    u = float(keyed_uniform([(seed, "timestep", number, epoch, use)])[0])
    if choice == "stratified":
        t = process.sample_timesteps(torch.tensor([(use + u) / count]))
    else:
        t = steps.timesteps[grid_index(len(steps), use, count, u)].reshape(1)
    timesteps = t.expand(len(batch.latents))
    noise = keyed_noise([("noise", *sample) for sample in batch.samples], batch.latents.shape[1:]).to(batch.latents)
    return Renoised(
        x_t=process.add_noise(batch.latents, noise, timesteps),
        timesteps=timesteps.to(batch.latents.device),
        target=process.target(batch.latents, noise, timesteps),
        sigma=float(process.sigma(t)[0]),
    )


def grid_index(steps: int, use: int, count: int, u: float) -> int:
    """Index in the sampler's timesteps: a draw ``u`` in [0, 1) from part ``use`` of ``count`` of 1 .. floor(0.9 N)."""
    last = max(1, math.floor(0.9 * steps))
    return min(steps - 1, 1 + int((use + u) / count * last))
