"""Consistency functions: from any point of a trajectory to its end, and the solver step that they are taught by.

Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378, on the processes of :mod:`diffalign.diffusion.noise`:

    f(x, t)  = c_skip(t) x + c_out(t) x_0(x, t),      f(x, 0) = x
    c_skip   = sigma_d^2 / ((s t)^2 + sigma_d^2)
    c_out    = s t / sqrt((s t)^2 + sigma_d^2)

with x_0 of whatever the network predicts. s, the timestep scaling, is 10 and sigma_d 1/2 in every published model, so
that c_skip is an impulse at t = 0 and nearly 0 elsewhere; c_out has no factor sigma_d, unlike EDM's. A sampler must
use the s of the training. On a rectified flow x_0 = x - sigma v is x itself at sigma = 0, and f is x_0 alone.

The solver takes one step of DDIM, skipping k timesteps, along the guided trajectory of the teacher:

    g     = g_cond + w (g_cond - g_uncond)            for g = x_0 and g = epsilon; a guidance scale of w + 1
    x_t'  = alpha_t' x_0 + sigma_t' epsilon
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.noise import FlowProcess, NoiseProcess
from diffalign.errors import UserError

Distance = Literal["huber", "l2"]


@dataclass(frozen=True)
class SolverGrid:
    """The M timesteps tau_i that a solver steps from, and where each step ends; rising, (M,) each."""

    timesteps: Tensor
    previous: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def solver_grid(process: NoiseProcess, num_steps: int) -> SolverGrid:
    """The grid of M steps: tau_i = k (i + 1) - 1 with k = T // M, and max(tau_i - k, 0); int64.

    On a flow the times are spread evenly over (0, T] and the first step ends at 0; float64.

    Raises:
        UserError: fewer than 1 step, or more than the process has timesteps.
    """
    total = process.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise UserError(f"the solver's grid must have 1 to {total} timesteps, got {num_steps}")
    index = torch.arange(num_steps)
    if isinstance(process, FlowProcess):
        return SolverGrid(total * (index + 1).double() / num_steps, total * index.double() / num_steps)
    skip = total // num_steps
    timesteps = skip * (index + 1) - 1
    return SolverGrid(timesteps, (timesteps - skip).clamp(min=0))


def boundary_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at timesteps t (B,), (B,) float64 each."""
    scaled = timestep_scaling * t.double()
    level = scaled**2 + sigma_data**2
    return sigma_data**2 / level, scaled / level.sqrt()


def consistency_function(
    process: NoiseProcess,
    pred: Tensor,
    x_t: Tensor,
    t: Tensor,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> Tensor:
    """f(x_t, t), (B, C, h, w), in float32, or float64 where ``x_t`` is.

    Args:
        process: says what the network predicts.
        pred: the network's output at ``x_t``, (B, C, h, w).
        x_t: noisy latents (B, C, h, w).
        t: (B,).
        timestep_scaling, sigma_data: s and sigma_d; without effect on a flow.
    """
    x_t = _wide(x_t)
    x0 = process.to_x0(pred.to(x_t.dtype), x_t, t)
    if isinstance(process, FlowProcess):
        return x0
    c_skip, c_out = boundary_scalings(t, timestep_scaling, sigma_data)
    return _column(c_skip, x_t) * x_t + _column(c_out, x_t) * x0


def solver_step(
    process: NoiseProcess, cond: Tensor, uncond: Tensor, w: Tensor, x_t: Tensor, t: Tensor, previous: Tensor
) -> Tensor:
    """x_t' of one guided DDIM step (of Euler, on a flow), (B, C, h, w), in float32, or float64 where ``x_t`` is.

    Args:
        process: says what the network predicts.
        cond, uncond: the teacher's outputs at ``x_t`` with and without the prompt, (B, C, h, w).
        w: guidance of each sample, (B,); 0 is without.
        x_t: noisy latents (B, C, h, w).
        t, previous: where the step starts and ends, (B,) each; the noise at ``t`` is above 0.
    """
    x_t = _wide(x_t)
    guidance = _column(w, x_t)

    def guided(of_cond: Tensor, of_uncond: Tensor) -> Tensor:
        return of_cond + guidance * (of_cond - of_uncond)

    cond, uncond = cond.to(x_t.dtype), uncond.to(x_t.dtype)
    x0 = guided(process.to_x0(cond, x_t, t), process.to_x0(uncond, x_t, t))
    epsilon = guided(process.to_epsilon(cond, x_t, t), process.to_epsilon(uncond, x_t, t))
    return process.add_noise(x0, epsilon, previous)


def consistency_distance(a: Tensor, b: Tensor, kind: Distance = "huber", c: float = 1e-3) -> Tensor:
    """d(a, b) of each sample, a mean over its elements: (B, ...) to (B,), in float32, or float64 where given.

    Args:
        kind: "huber" is ``sqrt(diff^2 + c^2) - c`` of each element; "l2" its square.
        c: where huber turns from a square into an absolute value.
    """
    difference = _wide(a) - b.to(_wide(a).dtype)
    each = difference.square() if kind == "l2" else (difference.square() + c**2).sqrt() - c
    return each.flatten(1).mean(1)


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """What a denoiser with ``time_cond_proj_dim`` is told of its guidance: (B,) to (B, dim), as pipelines compute it.

    sin and cos of ``1000 w 10000^(-j / (dim / 2 - 1))``, sines first.

    Args:
        w: guidance scale minus 1, (B,); float32, or float64.
    """
    from diffusers import StableDiffusionPipeline

    # Phases reach 10^4, where float32 rounds visibly: training must round as sampling does.
    embed = StableDiffusionPipeline.get_guidance_scale_embedding
    embedded: Tensor = embed(None, w.cpu(), embedding_dim=dim, dtype=w.dtype)
    return embedded.to(w.device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _column(values: Tensor, x: Tensor) -> Tensor:
    """Shape (B,) numbers to multiply (B, ...)."""
    return values.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))
