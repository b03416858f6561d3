"""AWM: reinforcement learning by the model's own training loss, weighted by advantage.

Xue, Ge, Zhang, Li, Ma, "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models", ICML 2026,
arXiv 2509.25050. The log-likelihood of an image is replaced by minus its denoising error m at a random timestep,
weighted by the noise level; with a the clamped advantage and s that "log-probability",

    L = E max( -a r, -a clip(r, 1 - c, 1 + c) ) + beta |v - v_ref|^2 + beta_ema |v - v_ema|^2,   r = exp(s - s_old)

On-policy (one update a rollout) r is 1 and the gradient is -a grad s: denoise what was good, un-denoise what was bad.

What differs from the paper: the paper trains flow models; here the error is that of the checkpoint's own target
(epsilon, v or velocity), with the noise level sigma_t of its process where the paper has sigma. s_old comes from a
copy of the policy as it drew the rollout, and only where a rollout gets more than one update. Ratios are taken at
each timestep ("exp_first"); the authors' other choice, one ratio of the mean over timesteps, is the same on-policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.config import field
from diffalign.diffusion.error import per_sample_mse
from diffalign.trainers.ddpo import clipped_surrogate
from diffalign.training.online import OnlineBatch, OnlineNeeds
from diffalign.training.renoise import ForwardConfig, ForwardTrainer, Renoised, Timesteps

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


def matching_log_prob(
    m: Tensor, sigma: Tensor | float, weighting: Weighting = "ghuber", power: float = 0.25
) -> Tensor:
    """What stands for the log-probability of an image, (B,), from its denoising error.

    Args:
        m: mean squared error of each image, (B,), 0 or more, float64.
        sigma: noise level of the timestep, in [0, 1].
        weighting: "uniform" -m; "t" -sigma m; "t2" -sigma^2 m; "huber" -sigma (sqrt(m + 1e-10) - 1e-5); "ghuber"
            -sigma ((m + 1e-10)^p - (1e-10)^p) / p, the authors' choice, with p = 1/4.
        power: p of "ghuber".
    """
    if weighting == "uniform":
        return -m
    if weighting == "t":
        return -sigma * m
    if weighting == "t2":
        return -(sigma**2) * m
    if weighting == "huber":
        return -sigma * ((m + 1e-10).sqrt() - 1e-5)
    return -sigma * ((m + 1e-10) ** power - 1e-10**power) / power


def elbo_scale(sigma: float) -> float:
    """``1 / (2 s_t^2)`` with ``s_t = 0.7 sqrt(sigma / (1 - min(sigma, 0.99)))``: weight of a KL in ELBO form."""
    return 1 / (2 * 0.49 * sigma / (1 - min(sigma, 0.99)))


@dataclass(kw_only=True)
class AWMConfig(ForwardConfig):
    """Settings of AWM."""

    guidance_scale: float = field(1.0, help="Guidance of a rollout; training is without, so 1 (none) is the method's.")
    advantage: Literal["group", "global_std", "tracker", "batch"] = field(
        "global_std", help="What a reward is compared with: its group, in units of the spread of all (the authors')."
    )
    advantage_max: float = field(1.0, help="The largest advantage is scaled to this.")
    awm_weighting: Weighting = field("ghuber", help="Log-probability from the error. Authors: ghuber.")
    ghuber_power: float = field(0.25, help="Power p of ghuber.")
    clip_range: float = field(1.0, help="Largest change of the ratio that still counts; 1 hardly clips (authors').")
    kl_beta: float = field(1e-3, help="Pull to the reference's predictions. Authors: 1e-4 to 3e-3.")
    ema_beta: float = field(1.0, help="Pull to the predictions of the slow copy. Authors: 1.")
    kl_form: Literal["uniform", "elbo"] = field("uniform", help="Weight of both pulls over noise levels.")
    ema_max_decay: float = field(0.3, help="The slow copy's decay is min(this, ema_decay_rate x rollouts).")
    ema_decay_rate: float = field(1e-3, help="See ema_max_decay.")
    timestep_choice: Timesteps = field(
        "rollout", help="Timesteps: those of the sampler (authors'), or of all training."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_range", "ghuber_power", "advantage_max"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("kl_beta", "ema_beta"):
            self._require(name, getattr(self, name) >= 0, "0 or more")


class AWMTrainer(ForwardTrainer[AWMConfig]):
    """Trains with AWM."""

    method = "awm"
    needs: ClassVar[OnlineNeeds] = OnlineNeeds(reference=True, copies=("old", "ema"))
    paper = """@article{xue2025advantage,
  title={Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models},
  author={Xue, Shuchen and Ge, Chongjian and Zhang, Shilong and Li, Yichen and Ma, Zhi-Ming},
  journal={arXiv preprint arXiv:2509.25050},
  year={2025}
}"""

    @classmethod
    def needs_reference(cls, config: AWMConfig) -> bool:
        return config.train_mode == "lora" or config.kl_beta > 0  # Beside a LoRA it costs nothing.

    @classmethod
    def frozen_passes(cls, config: AWMConfig) -> int:
        return int(config.kl_beta > 0) + cls.slow_copies(config)

    @classmethod
    def slow_copies(cls, config: AWMConfig) -> int:
        return int(config.num_updates_per_rollout * config.num_inner_epochs > 1) + int(config.ema_beta > 0)

    def copies(self) -> tuple[str, ...]:
        wanted = {"old": self.arithmetic.steps_per_rollout > 1, "ema": self.config.ema_beta > 0}
        return tuple(name for name in self.needs.copies if wanted[name])

    def after_rollout(self, number: int) -> None:
        if "old" in self.policy.copies:
            self.policy.update_copy("old", 0.0)
        if "ema" in self.policy.copies:
            decay = min(self.config.ema_max_decay, self.config.ema_decay_rate * (number + 1))
            self.policy.update_copy("ema", decay)

    def compute_loss(self, batch: OnlineBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        given = self.renoised(batch)
        # Before the policy's own pass: copies are swapped into the live weights, which its backward pass needs as is.
        anchors = {name: self._anchor(name, given, batch) for name in self._anchors(batch)}
        pred = self.predict(self.policy.denoiser, given, batch)
        m = per_sample_mse(pred.double(), given.target)
        s = self._log_prob(m, given)
        s_old = s.detach()
        if "old" in anchors:
            s_old = self._log_prob(per_sample_mse(anchors.pop("old").double(), given.target), given)
        a = batch.advantages.double() / config.advantage_clip * config.advantage_max
        loss = (batch.weight * clipped_surrogate(s, s_old, a, config.clip_range)).mean()
        report = {
            "error_liked": _mean_where(m, a > 0),
            "error_disliked": _mean_where(m, a < 0),
            "ratio": (s - s_old).exp().mean(),
            "clip_fraction": ((s - s_old).exp() - 1).abs().gt(config.clip_range).double().mean(),
        }
        scale = elbo_scale(given.sigma) if config.kl_form == "elbo" else 1.0
        weights = {"reference": config.kl_beta, "ema": config.ema_beta}
        for name, anchor in anchors.items():
            pull = scale * per_sample_mse(pred, anchor).mean()
            report[f"distance_to_{name}"] = pull
            loss = loss + weights[name] * pull
        return loss.float(), {name: value.detach().float() for name, value in report.items()}

    def _log_prob(self, m: Tensor, given: Renoised) -> Tensor:
        return matching_log_prob(m, given.sigma, self.config.awm_weighting, self.config.ghuber_power)

    def _anchors(self, batch: OnlineBatch) -> list[str]:
        """Whose predictions the loss needs beside the policy's."""
        wanted = {"old": not batch.fresh, "reference": self.config.kl_beta > 0, "ema": self.config.ema_beta > 0}
        return [name for name, needed in wanted.items() if needed]

    def _anchor(self, name: str, given: Renoised, batch: OnlineBatch) -> Tensor:
        weights = self.policy.reference() if name == "reference" else self.policy.copy_weights(name)
        with weights as denoiser:
            return self.predict(denoiser, given, batch)


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Sum and number of the values of a mask, (2,): a metric that is left out where it is empty."""
    return torch.stack([(values * mask).sum(), mask.sum().to(values)])
