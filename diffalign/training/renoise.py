"""Noising the images of a rollout again, for objectives on the forward process: AWM, NFT, reward-weighted regression.

They need of a rollout the clean latents alone, so any sampler will do, and each image is trained on at T timesteps
with fresh noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from diffalign.config import field
from diffalign.diffusion.error import per_sample_mse
from diffalign.diffusion.noise import NoiseProcess
from diffalign.diffusion.random import keyed_noise, keyed_uniform
from diffalign.diffusion.steps import Steps
from diffalign.training.online import OnlineBatch, OnlineTrainer
from diffalign.training.online_config import OnlineConfig

Timesteps = Literal["stratified", "rollout"]


@dataclass(kw_only=True)
class ForwardConfig(OnlineConfig):
    """What methods on the forward process share."""

    num_train_steps_per_image: int | None = field(6, help="Timesteps each image is trained at. AWM's authors: 6.")
    eta: float = field(0.0, help="Noise of the sampler; any will do, 0 is deterministic.")
    timestep_choice: Timesteps = field("stratified", help="Timesteps: of all training, or those of the sampler.")


Config = TypeVar("Config", bound=ForwardConfig)


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


class ForwardTrainer(OnlineTrainer[Config], Generic[Config]):
    """A method that noises images of a rollout again and looks at the prediction."""

    def renoised(self, batch: OnlineBatch) -> Renoised:
        """The batch, noised for its pass."""
        process, passes = self.family.noise_process, self.arithmetic.passes_per_image
        return renoise(process, batch, self.steps, passes, self.config.timestep_choice, self.config.seed)

    def predict(self, denoiser: nn.Module, given: Renoised, batch: OnlineBatch) -> Tensor:
        """A network's prediction there, without guidance: (B, C, h, w)."""
        return self.family.predict(denoiser, given.x_t, given.timesteps, batch.given.text, batch.given.sizes)

    def health(self, batch: OnlineBatch) -> dict[str, float]:
        """Mean squared distance of predictions to the reference's; not in full fine-tuning that keeps none."""
        needed = self.needs_reference(self.config)
        if self.config.train_mode == "full" and not needed:
            return {}
        given = self.renoised(batch)
        with self.policy.reference() if needed else self.policy.base() as network:
            frozen = self.predict(network, given, batch)
        own = self.predict(self.policy.modules[self.family.denoiser_part], given, batch)
        return {"distance_to_reference": float(per_sample_mse(own, frozen).mean())}
