"""Rollouts: drawing images with the policy, and keeping what an objective needs of how they were drawn.

An image is a function of (model, prompt, seed): its starting noise and the noise of each step are keyed by its seed,
so it is the same whatever batch or process it is drawn in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.diffusion.random import keyed_noise
from diffalign.diffusion.steps import Steps
from diffalign.pipelines.base import Family

Text = Mapping[str, Tensor]


@dataclass(frozen=True)
class Condition:
    """What B images are drawn for.

    Attributes:
        text: embeddings of the prompts, each (B, ...).
        unconditional: embeddings for guidance, each (1, ...); None draws without guidance.
        guidance_scale: g in ``u + g (c - u)``; 1 is without.
        sizes: int64 (B, 6), see :meth:`diffalign.pipelines.base.Family.predict`; None for an uncropped image.
    """

    text: Text
    unconditional: Text | None = None
    guidance_scale: float = 1.0
    sizes: Tensor | None = None

    @property
    def guided(self) -> bool:
        return self.unconditional is not None and self.guidance_scale != 1

    @cached_property
    def both(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Embeddings and sizes of both branches, without the prompt and with, (2B, ...); made once for all steps."""
        assert self.unconditional is not None
        text = {
            name: torch.cat([self.unconditional[name].to(value).expand_as(value), value])
            for name, value in self.text.items()
        }
        return text, None if self.sizes is None else torch.cat([self.sizes, self.sizes])


def guided_predict(family: Family, denoiser: nn.Module, x: Tensor, timesteps: Tensor, given: Condition) -> Tensor:
    """The prediction that sampling follows, both branches in one pass: (B, C, h, w) float32.

    Args:
        x: noisy latents (B, C, h, w).
        timesteps: (B,).
        given: prompts and guidance; equal in sampling and in training, or the ratio of an objective is not 1.
    """
    if not given.guided:
        return family.predict(denoiser, x, timesteps, given.text, given.sizes)
    unconditional, conditional = predict_both(family, denoiser, x, timesteps, given)
    return unconditional + given.guidance_scale * (conditional - unconditional)


def predict_both(
    family: Family, denoiser: nn.Module, x: Tensor, timesteps: Tensor, given: Condition
) -> tuple[Tensor, Tensor]:
    """The predictions without and with the prompt, in one pass: (B, C, h, w) float32 each. See :func:`guided_predict`.

    The guidance scale of ``given`` plays no part.
    """
    text, sizes = given.both
    both = family.predict(denoiser, torch.cat([x, x]), torch.cat([timesteps, timesteps]), text, sizes)
    unconditional, conditional = both.split(len(x))
    return unconditional, conditional


@dataclass
class Trajectory:
    """How N images were drawn: one row an image, on the CPU.

    Attributes:
        latents: the clean latents x_0 that the image was decoded from, (N, C, h, w) float32.
        seeds: of each image, int64 (N,).
        index: which steps were kept, int64 (N, K).
        x, x_next: latents before and after each kept step, (N, K, C, h, w), in the storage dtype.
        log_probs: of each kept step, (N, K) float32, computed on what is stored.
    """

    latents: Tensor
    seeds: Tensor
    index: Tensor
    x: Tensor
    x_next: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """The rows of several, in order."""
        return Trajectory(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Trajectory)})

    def rows(self, index: Tensor) -> Trajectory:
        """Some rows, in the order of ``index`` (M,)."""
        return Trajectory(**{f.name: getattr(self, f.name)[index] for f in fields(Trajectory)})

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name, for saving."""
        return {f.name: getattr(self, f.name) for f in fields(Trajectory)}


def starting_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """x_T of each seed: unit Gaussian (N, *shape), float32, CPU."""
    return keyed_noise([("rollout", "start", seed) for seed in seeds], shape)


def step_noise(seeds: Sequence[int], step: int, shape: Sequence[int]) -> Tensor:
    """What step ``step`` adds for each seed: unit Gaussian (N, *shape), float32, CPU."""
    return keyed_noise([("rollout", step, seed) for seed in seeds], shape)


@torch.no_grad()
def rollout(
    family: Family,
    denoiser: nn.Module,
    steps: Steps,
    given: Condition,
    seeds: Sequence[int],
    latent_shape: Sequence[int],
    *,
    keep: Sequence[int] = (),
    start: Tensor | None = None,
    storage: torch.dtype = torch.float32,
) -> Trajectory:
    """Draw one image's latents for each seed.

    Args:
        family: the model.
        denoiser: the policy, or whoever draws; in evaluation mode if it has dropout.
        steps: the sampler.
        given: prompts of the images.
        seeds: one for each.
        latent_shape: (C, h, w).
        keep: indices of the steps to keep, each stochastic; none for objectives that need x_0 alone.
        start: x_T (N, C, h, w) instead of the seeds' own.
        storage: dtype of kept latents. Narrower latents are rounded before they are used further, so that the kept
            log-probabilities are those of what is kept.

    Returns:
        The trajectory, on the CPU.
    """
    device = family.device
    x = (starting_noise(seeds, latent_shape) if start is None else start.float()).to(device)
    if keep:
        x = x.to(storage).float()
    kept: dict[str, list[Tensor]] = {"x": [], "x_next": [], "log_probs": []}
    for i in range(len(steps)):
        index = torch.full((len(x),), i)
        timesteps = steps.timesteps[index].to(device, non_blocking=True)
        model_pred = guided_predict(family, denoiser, x, timesteps, given)
        # Drawn while the device still works on the prediction; for the same reason nothing is fetched before the end.
        noise = step_noise(seeds, i, latent_shape).to(device, non_blocking=True) if steps.std[i] > 0 else None
        step = steps.step(model_pred, x, index)
        x_next = step.mean if noise is None else step.sample(noise)
        if keep:
            x_next = x_next.to(storage).float()
        if i in keep:
            kept["x"].append(x.to(storage))
            kept["x_next"].append(x_next.to(storage))
            kept["log_probs"].append(step.log_prob(x_next))
        x = x_next
    empty = torch.zeros(len(x), 0, *latent_shape, dtype=storage)
    return Trajectory(
        latents=x.float().cpu(),
        seeds=torch.tensor(list(seeds), dtype=torch.int64),
        index=torch.tensor(sorted(keep), dtype=torch.int64).expand(len(x), len(keep)).contiguous(),
        x=torch.stack(kept["x"], 1).cpu() if keep else empty,
        x_next=torch.stack(kept["x_next"], 1).cpu() if keep else empty.clone(),
        log_probs=torch.stack(kept["log_probs"], 1).cpu() if keep else torch.zeros(len(x), 0),
    )


def select_text(text: Text, index: Tensor | Sequence[int]) -> dict[str, Tensor]:
    """Rows of batched text embeddings."""
    chosen: Any = torch.as_tensor(index)
    return {name: value[chosen.to(value.device)] for name, value in text.items()}
