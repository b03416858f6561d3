"""DDPO: reinforcement learning of a diffusion model from any reward, step by step of its sampler.

Black, Janner, Du, Kostrikov, Levine, "Training Diffusion Models with Reinforcement Learning", ICLR 2024, arXiv
2305.13301: the clipped importance-sampling variant, DDPO-IS. Each stochastic sampling step is an action with a
Gaussian policy; with A the advantage of the finished image and r = exp(log p_new - log p_old) of a step,

    L = E max( -A r, -A clip(r, 1 - c, 1 + c) )

What differs from the paper: log-probabilities are means over the latent's elements, not sums, as in the authors' code
(so c is small: 1e-4 on the mean is 1.6 on the sum of 16,384 elements); the steps of an image may be a subset;
advantages may be taken within groups of one prompt; a pull to the reference (``kl_beta``) can be added, as in
Flow-GRPO, whose objective this is with a flow sampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.config import field
from diffalign.diffusion.steps import GaussianStep
from diffalign.errors import UserError
from diffalign.training.online import OnlineBatch, OnlineNeeds, OnlineTrainer
from diffalign.training.online_config import OnlineConfig
from diffalign.training.rollout import guided_predict


def clipped_surrogate(log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """``max(-A r, -A clip(r, 1 - c, 1 + c))`` of each step, (B,): PPO's clipped objective as a loss.

    Args:
        log_prob, log_prob_old: of the step under the policy now and when it was drawn, (B,), means over elements.
        advantage: of the image, (B,).
        clip_range: c; 1e-4 in the authors' code.
    """
    ratio = torch.exp(log_prob - log_prob_old)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def score_function(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """``-A log p`` of each step, (B,): REINFORCE, the paper's DDPO-SF, on-policy only."""
    return -advantage * log_prob


@dataclass(kw_only=True)
class DDPOConfig(OnlineConfig):
    """Settings of DDPO."""

    clip_range: float = field(1e-4, help="c: largest change of a step's ratio that still counts. Authors' code: 1e-4.")
    estimator: Literal["importance", "score"] = field(
        "importance", help="Importance ratios with clipping (DDPO-IS), or the plain score function (DDPO-SF)."
    )
    kl_beta: float = field(0.0, help="Weight of the KL to the reference, per step. DDPO has none (0).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("clip_range", self.clip_range > 0, "above 0")
        self._require("kl_beta", self.kl_beta >= 0, "0 or more")
        if self.lora_dropout:
            raise UserError("lora_dropout makes the ratio of a step random: leave it at 0 for this method")
        if self.estimator == "score" and self.num_updates_per_rollout * self.num_inner_epochs > 1:
            raise UserError("estimator score holds for one update a rollout: use importance, or one update")


class DDPOTrainer(OnlineTrainer[DDPOConfig]):
    """Trains with DDPO."""

    method = "ddpo"
    needs: ClassVar[OnlineNeeds] = OnlineNeeds(reference=True, steps=True)
    paper = """@inproceedings{black2024training,
  title={Training Diffusion Models with Reinforcement Learning},
  author={Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey},
  booktitle={ICLR},
  year={2024}
}"""

    @classmethod
    def needs_reference(cls, config: DDPOConfig) -> bool:
        return config.train_mode == "lora" or config.kl_beta > 0  # Beside a LoRA it costs nothing.

    @classmethod
    def frozen_passes(cls, config: DDPOConfig) -> int:
        return int(config.kl_beta > 0)

    def compute_loss(self, batch: OnlineBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        frozen = None
        if config.kl_beta:
            # Before the policy's own pass, whose backward pass needs the adapters as they were in it.
            with self.policy.reference() as reference:
                frozen = self._step(reference, batch)
        step = self._step(self.policy.denoiser, batch)
        log_prob = step.log_prob(batch.x_next)
        if config.estimator == "score":
            losses = score_function(log_prob, batch.advantages)
        else:
            losses = clipped_surrogate(log_prob, batch.log_probs, batch.advantages, config.clip_range)
        loss = (batch.weight * losses).mean()
        change = (log_prob - batch.log_probs).detach()
        report = {
            "log_ratio_error": change.abs().mean(),
            "ratio": change.exp().mean(),
            "clip_fraction": (change.exp() - 1).abs().gt(config.clip_range).float().mean(),
        }
        if frozen is not None:
            kl = step.kl(frozen)
            report["kl"] = kl.detach().mean()
            loss = loss + config.kl_beta * (batch.weight * kl).mean()
        return loss, report

    def health(self, batch: OnlineBatch) -> dict[str, float]:
        if not self.needs_reference(self.config):
            return {}
        with self.policy.reference() as reference:
            frozen = self._step(reference, batch)
        return {"kl_to_reference": float(self._step(self.policy.denoiser, batch).kl(frozen).mean())}

    def _step(self, denoiser: torch.nn.Module, batch: OnlineBatch) -> GaussianStep:
        timesteps = self.steps.timesteps[batch.index].to(batch.x.device)
        model_pred = guided_predict(self.family, denoiser, batch.x, timesteps, batch.given)
        return self.steps.step(model_pred, batch.x, batch.index)
