"""Noise processes: what is added to latents in training, and what the network is asked to predict.

Both processes write ``x_t = alpha_t x_0 + sigma_t epsilon`` and differ in (alpha, sigma) and in the target:

- :class:`DDPMProcess` (Ho et al. 2020, arXiv 2006.11239): ``alpha = sqrt(abar_t)``, ``sigma = sqrt(1 - abar_t)``,
  integer t; the network predicts epsilon, ``v = alpha epsilon - sigma x_0`` (Salimans & Ho 2022, arXiv 2202.00512)
  or x_0.
- :class:`FlowProcess` (Liu et al. 2022, arXiv 2209.03003): ``alpha = 1 - s``, ``sigma = s``, network time ``1000 s``;
  the network predicts the velocity ``epsilon - x_0``.

Every function takes a batch of different timesteps: latents are (B, C, h, w) and t is (B,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError, did_you_mean


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a (B,) coefficient to multiply a (B, ...) tensor."""
    # Not waiting for the device: in a sampler it is still busy with the prediction.
    return coefficient.to(device=x.device, dtype=x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


class NoiseProcess(ABC):
    """``x_t = alpha(t) x_0 + sigma(t) epsilon`` and the network's target on it."""

    prediction_type: str
    num_train_timesteps: int

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal level at timesteps ``t`` (B,), in float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at timesteps ``t`` (B,), in float64."""

    @abstractmethod
    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Map uniform numbers ``u`` (B,) in [0, 1) to the training distribution of timesteps."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at ``t``, shaped as ``x0``."""

    @abstractmethod
    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction stands for."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of clean latents ``x0`` and unit ``noise``, both (B, C, h, w)."""
        return _like(self.alpha(t), x0) * x0 + _like(self.sigma(t), x0) * noise

    def to_epsilon(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction stands for. Undefined (inf or NaN) where sigma is 0."""
        return (x_t - _like(self.alpha(t), x_t) * self.to_x0(pred, x_t, t)) / _like(self.sigma(t), x_t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ``alpha^2 / sigma^2``, (B,) in float64."""
        return (self.alpha(t) / self.sigma(t)) ** 2


class DDPMProcess(NoiseProcess):
    """Discrete variance-preserving process of Stable Diffusion 1.x, 2.x and SDXL.

    Args:
        alphas_cumprod: ``abar_t`` for t = 0 .. T-1, (T,).
        prediction_type: "epsilon", "v_prediction" or "sample".
    """

    PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in self.PREDICTION_TYPES:
            raise UserError(
                f"prediction_type {prediction_type!r} is not one of {', '.join(self.PREDICTION_TYPES)}."
                + did_you_mean(prediction_type, self.PREDICTION_TYPES)
            )
        self.alphas_cumprod = alphas_cumprod.double().cpu()
        self.prediction_type = prediction_type
        self.num_train_timesteps = len(alphas_cumprod)

    def alpha(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod[t.cpu().long()].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alphas_cumprod[t.cpu().long()]).sqrt()

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Uniform over the integers 0 .. T-1, int64."""
        return (u.double() * self.num_train_timesteps).long()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        return _like(self.alpha(t), x0) * noise - _like(self.sigma(t), x0) * x0

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "sample":
            return pred
        alpha, sigma = _like(self.alpha(t), x_t), _like(self.sigma(t), x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * pred) / alpha
        return alpha * x_t - sigma * pred

    def to_epsilon(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return pred
        if self.prediction_type == "v_prediction":
            return _like(self.alpha(t), x_t) * pred + _like(self.sigma(t), x_t) * x_t
        return super().to_epsilon(pred, x_t, t)


class FlowProcess(NoiseProcess):
    """Rectified flow, as in SD3 and FLUX: ``x_s = (1 - s) x_0 + s epsilon``; t = 1000 s is the network's time.

    Training times are logit-normal, ``s = sigmoid(mean + std * z)`` (Esser et al. 2024, arXiv 2403.03206, sec. 3.1).
    """

    prediction_type = "flow"

    def __init__(self, logit_mean: float = 0.0, logit_std: float = 1.0, num_train_timesteps: int = 1000) -> None:
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.num_train_timesteps = num_train_timesteps

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t.cpu().double() / self.num_train_timesteps

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Logit-normal times by inverse transform, float32 in (0, 1000)."""
        z = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
        return (torch.sigmoid(self.logit_mean + self.logit_std * z) * self.num_train_timesteps).float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t - _like(self.sigma(t), x_t) * pred


def from_scheduler_config(config: Mapping[str, Any]) -> NoiseProcess:
    """Build the process that a checkpoint's ``scheduler_config.json`` describes.

    The betas, zero-terminal-SNR rescaling and defaults are those of ``diffusers.DDPMScheduler``.

    Raises:
        UserError: the scheduler's class or prediction type is not known.
    """
    from diffusers import DDPMScheduler

    name = str(config.get("_class_name", "DDPMScheduler"))
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        return FlowProcess(num_train_timesteps=int(config.get("num_train_timesteps", 1000)))
    keys = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    if "beta_schedule" not in config:
        raise UserError(
            f"scheduler {name!r} has no beta_schedule, so its noise process is unknown. "
            "Use a checkpoint whose scheduler_config.json is a DDPM-family or FlowMatch scheduler."
        )
    scheduler = DDPMScheduler(**{key: config[key] for key in keys if config.get(key) is not None})
    return DDPMProcess(scheduler.alphas_cumprod, str(config.get("prediction_type", "epsilon")))
