"""One step of a stochastic sampler is a Gaussian: one kernel for DDIM with eta, the flow SDEs and LCM.

Write the prediction at step i as the clean latents ``x_0`` and the noise ``epsilon`` that it stands for,
``x_i = alpha_i x_0 + sigma_i epsilon``. Every sampler here then draws

    x_{i+1} ~ N( alpha_{i+1} x_0 + c_i epsilon,  s_i^2 )

and differs only in the two numbers (s_i, c_i) of each step:

=============  ==================================================================  ==================================
sampler        s_i                                                                 c_i
=============  ==================================================================  ==================================
ddim           eta (sigma_{i+1} / sigma_i) sqrt(sigma_i^2 - r_i^2 sigma_{i+1}^2)   sqrt(sigma_{i+1}^2 - s_i^2)
cps            sigma_{i+1} sin(eta pi / 2)                                         sqrt(sigma_{i+1}^2 - s_i^2)
flow_sde       eta sqrt(sigma_i / (1 - sigma_i)) sqrt(sigma_i - sigma_{i+1})       sigma_{i+1} - s_i^2 / (2 sigma_i)
dance          eta sqrt(sigma_i - sigma_{i+1})                                     sigma_{i+1} - s_i^2 / (2 sigma_i)
lcm            sigma_{i+1}                                                         0
=============  ==================================================================  ==================================

ddim: Song et al. 2021, arXiv 2010.02502, eq. 12 and 16, with r_i = alpha_i / alpha_{i+1}; where alpha^2 + sigma^2 = 1
the root is their sqrt(1 - r_i^2). eta 0 is the probability-flow ODE (Euler, for a flow), eta 1 the posterior.
cps: Flow-CPS, arXiv 2509.05952; it keeps the level of noise, not the distribution. flow_sde: Flow-GRPO, Liu et al.
2025, arXiv 2505.05470, with sigma_1 for the sigma_0 = 1 that would divide by zero, as its authors run it. dance:
DanceGRPO, arXiv 2505.07818. lcm: Luo et al. 2023, arXiv 2310.04378, for consistency models: its ``x_0`` is their f,
and its timesteps are among those that they are distilled on. flow_sde and dance are for rectified flow, where
alpha = 1 - sigma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffalign.diffusion.consistency import consistency_function
from diffalign.diffusion.noise import FlowProcess, NoiseProcess
from diffalign.errors import UserError, did_you_mean

SamplerName = Literal["ddim", "cps", "flow_sde", "dance", "lcm"]


@dataclass(frozen=True)
class Steps:
    """The N steps of a sampler on one noise process, from pure noise to clean latents.

    Attributes:
        process: converts predictions.
        timesteps: what the network is given at each step, (N,).
        alpha, sigma: signal and noise level before each step and after the last, (N + 1,) float64.
        std: s_i, (N,) float64; 0 where the step is deterministic, and has no log-probability.
        eps_coef: c_i, (N,) float64.
        timestep_scaling: of a consistency model's boundary scalings, whose f then is the ``x_0``; None for others.
    """

    process: NoiseProcess
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    std: Tensor
    eps_coef: Tensor
    timestep_scaling: float | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic(self) -> list[int]:
        """Indices of the steps that have a log-probability."""
        return [i for i, s in enumerate(self.std.tolist()) if s > 0]

    def step(self, model_pred: Tensor, x: Tensor, index: Tensor) -> GaussianStep:
        """The Gaussian that step ``index`` draws from.

        Args:
            model_pred: the network's output at ``x``, (B, C, h, w), guided if sampling is.
            x: noisy latents before the step, (B, C, h, w).
            index: which step each sample is at, int64 (B,).

        Returns:
            Mean and standard deviation in float32, or float64 where ``x`` is.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        model_pred, x = model_pred.to(wide), x.to(wide)
        index = index.cpu()
        t = self.timesteps[index]
        if self.timestep_scaling is None:
            x0 = self.process.to_x0(model_pred, x, t)
        else:
            x0 = consistency_function(self.process, model_pred, x, t, self.timestep_scaling)

        def column(values: Tensor) -> Tensor:
            return values[index].to(x.device, wide, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))

        # From x_0 rather than from the prediction: so it is right for every prediction type.
        epsilon = (x - column(self.alpha) * x0) / column(self.sigma)
        mean = column(self.alpha[1:]) * x0 + column(self.eps_coef) * epsilon
        return GaussianStep(mean, column(self.std).flatten(), x0, bool((self.std[index] > 0).all()))


@dataclass(frozen=True)
class GaussianStep:
    """``N(mean, std^2)`` for each of B samples.

    Attributes:
        mean: (B, C, h, w).
        std: (B,); 0 for a deterministic step.
        x0: the clean latents that the prediction stands for, (B, C, h, w).
        noisy: no std is 0; said here, because to look at ``std`` would wait for the device.
    """

    mean: Tensor
    std: Tensor
    x0: Tensor
    noisy: bool

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``."""
        return self.mean + self._std * noise.to(self.mean)

    def log_prob(self, x_next: Tensor) -> Tensor:
        """Log-density of ``x_next`` (which gets no gradient), averaged over its elements: (B,).

        The average, not the sum, as DDPO and its kin have it: their clip ranges are meant for it.

        Raises:
            ValueError: a step has no noise, so no density.
        """
        if not self.noisy:
            raise ValueError("a deterministic step (std 0) has no log-probability; leave it out of training")
        z = (x_next.detach().to(self.mean) - self.mean) / self._std
        return -0.5 * z.square().flatten(1).mean(1) - self.std.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, other: GaussianStep) -> Tensor:
        """``KL(self || other)`` of two steps with equal std, averaged over elements: (B,)."""
        return ((self.mean - other.mean) / self._std).square().flatten(1).mean(1) / 2

    @property
    def _std(self) -> Tensor:
        return self.std.reshape(-1, *[1] * (self.mean.ndim - 1))


def make_steps(
    process: NoiseProcess,
    scheduler_config: Mapping[str, Any],
    num_steps: int,
    sampler: SamplerName = "ddim",
    eta: float = 1.0,
) -> Steps:
    """Build a sampler's steps with the timesteps that diffusers would use for a checkpoint.

    Args:
        process: of the checkpoint.
        scheduler_config: its ``scheduler_config.json``: time spacing, final alpha, shift.
        num_steps: N.
        sampler: see the module.
        eta: noise level: 0 is deterministic; 1 is DDPO's; 0.7 is Flow-GRPO's, 0.3 DanceGRPO's, 0.8 to 1.2 that of CPS.

    Raises:
        UserError: no such sampler, a flow sampler for a model that is none, or a number out of range.
    """
    if sampler not in get_args(SamplerName):
        known = get_args(SamplerName)
        raise UserError(
            f"there is no sampler {sampler!r}.{did_you_mean(sampler, known)} Samplers: {', '.join(known)}."
        )
    if sampler in ("flow_sde", "dance") and not isinstance(process, FlowProcess):
        raise UserError(
            f"the sampler {sampler} is for flow models, but this model has {process.prediction_type} prediction: "
            "use ddim"
        )
    if num_steps < 1 or eta < 0:
        raise UserError(f"a sampler needs at least 1 step and an eta of 0 or more, got {num_steps} and {eta}")
    if sampler == "lcm" and not isinstance(process, FlowProcess):
        return _consistency_steps(process, scheduler_config, num_steps)
    timesteps, alpha, sigma = _grid(process, scheduler_config, num_steps)
    std, eps_coef = coefficients(sampler, alpha, sigma, eta)
    if sampler == "ddim" and bool((std > sigma[1:] + 1e-9).any()):
        most = float((eta * sigma[1:] / std)[std > 0].min())
        raise UserError(f"eta {eta:g} adds more noise than the steps of ddim hold: use 1, or at most {most:.3f}")
    return Steps(process, timesteps, alpha, sigma, std, eps_coef)


def _consistency_steps(process: NoiseProcess, config: Mapping[str, Any], num_steps: int) -> Steps:
    """The steps of ``diffusers.LCMScheduler``; the last one ends at f itself."""
    from diffusers import LCMScheduler

    scheduler: Any = LCMScheduler.from_config(dict(config))
    if num_steps > scheduler.config.original_inference_steps:
        raise UserError(
            f"the sampler lcm draws in at most {scheduler.config.original_inference_steps} steps, got {num_steps}"
        )
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.cpu()
    one = torch.ones(1, dtype=torch.float64)
    alpha, sigma = torch.cat([process.alpha(timesteps), one]), torch.cat([process.sigma(timesteps), 0 * one])
    levels = coefficients("lcm", alpha, sigma, 0.0)
    return Steps(process, timesteps, alpha, sigma, *levels, float(scheduler.config.timestep_scaling))


def coefficients(sampler: SamplerName, alpha: Tensor, sigma: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(s_i, c_i) of each step, (N,) and (N,) float64, of levels (N + 1,): the table of this module."""
    (a, a_next), (s, s_next) = (alpha[:-1], alpha[1:]), (sigma[:-1], sigma[1:])
    if sampler == "ddim":
        std = eta * s_next / s * (s**2 - (a / a_next * s_next) ** 2).clamp(min=0).sqrt()
    elif sampler == "cps":
        std = s_next * math.sin(eta * math.pi / 2)
    elif sampler == "lcm":
        return s_next, torch.zeros_like(s_next)
    else:
        below_one = torch.where(s == 1, s_next, s)
        rate = eta * (s / (1 - below_one)).sqrt() if sampler == "flow_sde" else torch.full_like(s, eta)
        std = rate * (s - s_next).sqrt()
        # The last step would leave its noise in the image; it is taken without.
        std = torch.where(s_next == 0, 0, std)
        return std, s_next - std**2 / (2 * s)
    return std, (s_next**2 - std**2).clamp(min=0).sqrt()


def _grid(process: NoiseProcess, config: Mapping[str, Any], num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps (N,), and alpha and sigma (N + 1,) float64, as the diffusers scheduler of the checkpoint has them.

    Each step ends where the next one starts. ``DDIMScheduler.step`` goes T // N down instead, which with "trailing"
    spacing and an N that does not divide T misses the next timestep by one, and the end of the schedule.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if isinstance(process, FlowProcess):
        flow: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
        flow.set_timesteps(num_steps)
        sigma = flow.sigmas.double().cpu()
        return flow.timesteps.cpu(), 1 - sigma, sigma
    ddim: Any = DDIMScheduler.from_config(dict(config))
    ddim.set_timesteps(num_steps)
    timesteps = ddim.timesteps.cpu()
    last = torch.as_tensor(ddim.final_alpha_cumprod).double().reshape(1)
    alpha = torch.cat([process.alpha(timesteps), last.sqrt()])
    sigma = torch.cat([process.sigma(timesteps), (1 - last).clamp(min=0).sqrt()])
    return timesteps, alpha, sigma
