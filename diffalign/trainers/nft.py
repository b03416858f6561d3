"""DiffusionNFT: reinforcement learning on the forward process, by contrast with the policy that drew the images.

Zheng, Chen et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", 2025, arXiv 2509.16117. With
r in [0, 1] the optimality of an image (its advantage, scaled), v the policy's prediction at a noised image and v_old
that of the policy that drew it, two implicit policies are matched to the image x_0, weighted by r and by 1 - r:

    v+ = beta v + (1 - beta) v_old,      v- = (1 + beta) v_old - beta v
    L  = E [ r |x0(v+) - x_0|^2 / w+  +  (1 - r) |x0(v-) - x_0|^2 / w- ] * clip / beta  +  kl_beta |v - v_ref|^2

where w is the mean absolute error of x0(v), without gradient, and clip is that of the advantage (5).

What differs from the paper: x0(v) is the clean image that the checkpoint's own prediction (epsilon, v or velocity)
stands for, so it works on models that are no flows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from diffalign.config import field
from diffalign.diffusion.error import per_sample_mse
from diffalign.diffusion.noise import NoiseProcess
from diffalign.training.online import OnlineBatch, OnlineNeeds
from diffalign.training.renoise import ForwardConfig, ForwardTrainer


def optimality(advantage: Tensor, clip: float = 5.0) -> Tensor:
    """r of an image, in [0, 1]: ``clamp(A, -clip, clip) / (2 clip) + 1/2``, (B,)."""
    return (advantage.clamp(-clip, clip) / (2 * clip) + 0.5).clamp(0, 1)


def nft_loss(
    pred: Tensor,
    pred_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    timesteps: Tensor,
    r: Tensor,
    process: NoiseProcess,
    beta: float = 1.0,
    scale: float = 5.0,
) -> Tensor:
    """The policy term of each image, (B,).

    Args:
        pred, pred_old: predictions of the policy and of the one that drew the image, (B, C, h, w).
        x_t, x0: noised and clean latents, (B, C, h, w).
        timesteps: (B,).
        r: optimality, (B,) in [0, 1].
        process: turns predictions into clean latents.
        beta: how far the implicit policies lie from the old one; 1 or 0.1 in the authors' code.
        scale: factor on the whole, the clip of the advantage.
    """
    liked = process.to_x0(beta * pred + (1 - beta) * pred_old, x_t, timesteps)
    disliked = process.to_x0((1 + beta) * pred_old - beta * pred, x_t, timesteps)

    def matched(estimate: Tensor) -> Tensor:
        w = (estimate - x0).abs().flatten(1).mean(1).clamp(min=1e-5).detach()
        return per_sample_mse(estimate, x0) / w

    return scale / beta * (r * matched(liked) + (1 - r) * matched(disliked))


@dataclass(kw_only=True)
class NFTConfig(ForwardConfig):
    """Settings of DiffusionNFT."""

    guidance_scale: float = field(1.0, help="Guidance of a rollout; training is without, so 1 (none) is the method's.")
    advantage: Literal["group", "global_std", "tracker", "batch"] = field(
        "global_std", help="What a reward is compared with: its group, in units of the spread of all (the authors')."
    )
    nft_beta: float = field(1.0, help="Distance of the implicit policies from the old one. Authors: 1, or 0.1.")
    kl_beta: float = field(1e-4, help="Pull to the reference's predictions. Authors: 1e-4.")
    old_decay_rate: float = field(1e-3, help="Decay of the policy that draws is min(rate x rollouts, old_max_decay).")
    old_max_decay: float = field(0.5, help="See old_decay_rate. Authors: 0.5.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("nft_beta", self.nft_beta > 0, "above 0")
        self._require("kl_beta", self.kl_beta >= 0, "0 or more")
        self._require("old_max_decay", 0 <= self.old_max_decay < 1, "in [0, 1)")


class NFTTrainer(ForwardTrainer[NFTConfig]):
    """Trains with DiffusionNFT."""

    method = "nft"
    needs: ClassVar[OnlineNeeds] = OnlineNeeds(reference=True, copies=("old",))
    paper = """@article{zheng2025diffusionnft,
  title={DiffusionNFT: Online Diffusion Reinforcement with Forward Process},
  author={Zheng, Kaiwen and Chen, Huayu and others},
  journal={arXiv preprint arXiv:2509.16117},
  year={2025}
}"""

    @classmethod
    def needs_reference(cls, config: NFTConfig) -> bool:
        return config.train_mode == "lora" or config.kl_beta > 0  # Beside a LoRA it costs nothing.

    @classmethod
    def frozen_passes(cls, config: NFTConfig) -> int:
        return int(config.kl_beta > 0) + cls.slow_copies(config)

    def drawing(self) -> Any:
        return self.policy.copy_weights("old")

    def after_rollout(self, number: int) -> None:
        self.policy.update_copy("old", min(self.config.old_decay_rate * (number + 1), self.config.old_max_decay))

    def compute_loss(self, batch: OnlineBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, process = self.config, self.family.noise_process
        given = self.renoised(batch)
        # Before the policy's own pass: copies are swapped into the live weights, which its backward pass needs as is.
        with self.policy.copy_weights("old") as old:
            pred_old = self.predict(old, given, batch)
        pred_ref = None
        if config.kl_beta:
            with self.policy.reference() as reference:
                pred_ref = self.predict(reference, given, batch)
        pred = self.predict(self.policy.denoiser, given, batch)
        r = optimality(batch.advantages, config.advantage_clip)
        losses = nft_loss(
            pred,
            pred_old,
            given.x_t,
            batch.latents,
            given.timesteps,
            r,
            process,
            config.nft_beta,
            config.advantage_clip,
        )
        loss = (batch.weight * losses).mean()
        report = {
            "policy_loss": losses.mean().detach(),
            "distance_to_old": per_sample_mse(pred, pred_old).mean().detach(),
        }
        if pred_ref is not None:
            pull = per_sample_mse(pred, pred_ref).mean()
            report["distance_to_reference"] = pull.detach()
            loss = loss + config.kl_beta * pull
        return loss, report
