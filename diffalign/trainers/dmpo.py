"""DMPO: match the model's preference to a target preference in reverse Kullback-Leibler divergence.

Li et al., "Divergence Minimization Preference Optimization for Diffusion Model Alignment", 2025, arXiv 2507.07510.
With z the logit of Diffusion-DPO (:mod:`diffalign.trainers.dpo`), P = sigmoid(z) and Q = 1 - alpha:

    L = E[ P log(P / Q) + (1 - P) log((1 - P) / (1 - Q)) ]

Its minimum is at P = Q, so the margin does not grow for ever; alpha is the share of labels taken to be wrong. At z = 0
and alpha = 0.01 the loss is 1.61, not ln 2.

What differs from the published code: the logarithms are taken of the logit (softplus), so that no probability has to
be clamped. Ties can be kept: they weigh both orders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.config import field
from diffalign.trainers.dpo import LogitConfig, LogitTrainer, dpo_logit
from diffalign.training.pair_loss import PairErrors, both_orders


def dmpo_loss(z: Tensor, alpha: float = 0.01) -> Tensor:
    """The divergence of the model's preference from the target's, (B,), in nats.

    Args:
        z: logits of :func:`diffalign.trainers.dpo.dpo_logit`, (B,).
        alpha: share of labels taken to be wrong, in (0, 1).
    """
    log_p, log_not_p = logsigmoid(z), logsigmoid(-z)
    return log_p.exp() * (log_p - math.log1p(-alpha)) + log_not_p.exp() * (log_not_p - math.log(alpha))


@dataclass(kw_only=True)
class DMPOConfig(LogitConfig):
    """Settings of DMPO."""

    beta_dpo: float = field(
        6000.0,
        help="Pull to the reference, on mean squared errors with the factor 1/2. "
        "Published: 2000 (SD1.5), 6000 (SDXL).",
    )
    dmpo_alpha: float = field(0.01, help="Share of labels taken to be wrong. Published: 0.01.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("dmpo_alpha", 0 < self.dmpo_alpha < 0.5, "above 0 and below 0.5")


class DMPOTrainer(LogitTrainer[DMPOConfig]):
    """Trains with DMPO."""

    method = "dmpo"
    paper = """@article{li2025divergence,
  title={Divergence Minimization Preference Optimization for Diffusion Model Alignment},
  author={Li, Binxu and Xu, Minkai and Han, Jiaqi and Dang, Meihua and Ermon, Stefano},
  journal={arXiv preprint arXiv:2507.07510},
  year={2025}
}"""

    def loss(self, errors: PairErrors) -> tuple[Tensor, dict[str, Tensor]]:
        beta, alpha = self.config.beta_dpo, self.config.dmpo_alpha
        losses = both_orders(lambda e: dmpo_loss(dpo_logit(*e.against_reference, beta=beta), alpha), errors)
        return losses, {"margin": self.logit(errors).mean()}
