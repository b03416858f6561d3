"""DSPO: fit the score of the preferred images, corrected towards what is preferred.

Zhu et al., "DSPO: Direct Score Preference Optimization for Diffusion Model Alignment", ICLR 2025. With z the logit of
Diffusion-DPO at this method's beta, p and q the predictions of policy and reference on the chosen image, and
e = p - target:

    L = E mean_pixels( e - beta (1 - sigmoid(z)) (p - q) )^2                                   form "sd15"

The rejected image counts in z only. The authors' code for SDXL runs another loss, offered as form "sdxl":

    L = E (1 - sigmoid(z))^2                            where the mean of (p - q)^2 over the micro-batch is below 0.1
    L = E mean_pixels( (1 - sigmoid(z)) (p - q) )^2     elsewhere

It is not the score matching of the paper, jumps between its two cases and depends on the batch size. beta means two
things: 0.001 multiplies the correction in the first form, 5000 the logit in the second.

What differs from the published code: errors are float32; ties can be kept: they weigh both orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.config import field
from diffalign.trainers.dpo import dpo_logit
from diffalign.training.pair_loss import PairErrors, PairLossConfig, PairTrainer, both_orders

Form = Literal["sd15", "sdxl"]
PUBLISHED_BETA: dict[str, float] = {"sd15": 0.001, "sdxl": 5000.0}
_SWITCH = 0.1


def dspo_loss(residual: Tensor, shift: Tensor, z: Tensor, beta: float, form: Form = "sd15") -> Tensor:
    """The loss of each pair, (B,).

    Args:
        residual: policy prediction minus target on the chosen image, (B, C, h, w).
        shift: policy prediction minus reference prediction on it, (B, C, h, w).
        z: logits of :func:`diffalign.trainers.dpo.dpo_logit` at the same beta, (B,), with gradient.
        beta: weight of the correction; not used by "sdxl" outside z.
        form: which of the two published losses.
    """
    weight = torch.sigmoid(-z)
    wide = weight.reshape(-1, *[1] * (shift.ndim - 1))
    if form == "sd15":
        return (residual - beta * wide * shift).square().flatten(1).mean(1)
    if shift.detach().square().mean() < _SWITCH:
        return weight.square()
    return (wide * shift).square().flatten(1).mean(1)


@dataclass(kw_only=True)
class DSPOConfig(PairLossConfig):
    """Settings of DSPO."""

    dspo_form: Form = field(
        "sd15", help="Which of the published losses: sd15 is the paper's, sdxl the code's for SDXL."
    )
    beta_dspo: float | None = field(
        None, help="Weight of the correction (sd15) or factor of the logit (sdxl). Default: 0.001 (sd15), 5000 (sdxl)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("beta_dspo", self.beta_dspo is None or self.beta_dspo > 0, "above 0")

    @property
    def beta(self) -> float:
        """``beta_dspo``, or the published value of the form."""
        return PUBLISHED_BETA[self.dspo_form] if self.beta_dspo is None else self.beta_dspo


class DSPOTrainer(PairTrainer[DSPOConfig]):
    """Trains with DSPO."""

    method = "dspo"
    paper = """@inproceedings{zhu2025dspo,
  title={{DSPO}: Direct Score Preference Optimization for Diffusion Model Alignment},
  author={Zhu, Huaisheng and others},
  booktitle={ICLR},
  year={2025}
}"""

    def loss(self, errors: PairErrors) -> tuple[Tensor, dict[str, Tensor]]:
        beta, form = self.config.beta, self.config.dspo_form

        def loss(e: PairErrors) -> Tensor:
            assert e.reference is not None
            policy, reference, target = (x.chunk(2)[0].float() for x in (e.policy, e.reference, e.target))
            return dspo_loss(
                policy - target, policy - reference, dpo_logit(*e.against_reference, beta=beta), beta, form
            )

        return both_orders(loss, errors), {"margin": dpo_logit(*errors.against_reference, beta=beta).mean()}

    def facts(self) -> Mapping[str, str]:
        meaning = "weight of the correction" if self.config.dspo_form == "sd15" else "factor of the logit, with 1/2"
        return {"beta": f"{self.config.beta:g}, {meaning}"}
