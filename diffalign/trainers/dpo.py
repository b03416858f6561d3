"""Diffusion-DPO: align a diffusion model with preference pairs, without a reward model.

Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", CVPR 2024, arXiv 2311.12908.
The objective is its eq. 14, with omega constant and T folded into beta, as the authors ran it:

    L = -E log sigmoid( -beta/2 * [ (m_w - m_l) - (r_w - r_l) ] )

with m = |target - policy(x_t, t)|^2 and r = |target - reference(x_t, t)|^2 of the chosen (w) and the rejected (l)
image, noised with the same noise to the same timestep.

What differs from the paper: squared errors are means over the latent's elements, not sums (a beta of 5000 here is
5000 / (C h w) on sums), so beta means the same at every resolution; epsilon, v and flow targets alike; ties can be
kept as soft labels; and four other losses on the same logit are offered beside the sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from diffalign.config import field
from diffalign.errors import UserError
from diffalign.training.pair_loss import PairErrors, PairLossConfig, PairTrainer

LossType = Literal["sigmoid", "hinge", "ipo", "ipo_raw", "robust"]


def dpo_logit(m_w: Tensor, m_l: Tensor, r_w: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """The implicit-reward margin ``z = -beta/2 [(m_w - m_l) - (r_w - r_l)]``, eq. 14.

    Args:
        m_w, m_l: policy error on the chosen and on the rejected image, (B,): means of squares per sample.
        r_w, r_l: the reference's, (B,).
        beta: pull to the reference, for errors that are means and with the factor 1/2; 2000 to 5000 in the paper.

    Returns:
        z, (B,): above 0 where the policy prefers the chosen image more than the reference does.
    """
    return -0.5 * beta * ((m_w - m_l) - (r_w - r_l))


def preference_loss(
    z: Tensor,
    loss_type: LossType = "sigmoid",
    label: Tensor | None = None,
    label_smoothing: float = 0.0,
    beta: float | None = None,
) -> Tensor:
    """The loss of each pair at logit z; the mean over pairs comes after.

    Args:
        z: logits, (B,).
        loss_type: "sigmoid", -log sigmoid(z); "hinge", max(0, 1 - z) (Zhao et al. 2023, arXiv 2305.10425); "ipo",
            (z - 1/2)^2, which is IPO (Azar et al. 2023, arXiv 2310.12036) times (beta/2)^2; "ipo_raw", IPO in units
            of the error, (z / (beta/2) - 1/beta)^2, as published; "robust", the unbiased estimate under flipped
            labels (Chowdhury et al. 2024, arXiv 2403.00409, eq. 12).
        label: probability that the chosen image is preferred, (B,) in [0, 1]; 1 where None. The loss is its mean
            over the two orders.
        label_smoothing: share of labels taken to be flipped, in [0, 0.5). With "robust" it is the flip rate that is
            corrected for; with the others the label is drawn towards 1/2 by it (conservative DPO).
        beta: of z, for "ipo_raw".

    Returns:
        (B,).
    """
    if loss_type == "sigmoid":
        won, lost = -logsigmoid(z), -logsigmoid(-z)
    elif loss_type == "hinge":
        won, lost = relu(1 - z), relu(1 + z)
    elif loss_type == "ipo":
        won, lost = (z - 0.5).square(), (z + 0.5).square()
    elif loss_type == "ipo_raw":
        if beta is None:
            raise ValueError("ipo_raw needs the beta of the logit")
        won, lost = ((z - 0.5) / (0.5 * beta)).square(), ((z + 0.5) / (0.5 * beta)).square()
    else:
        e = label_smoothing
        plain = -logsigmoid(z), -logsigmoid(-z)
        won, lost = (((1 - e) * a - e * b) / (1 - 2 * e) for a, b in (plain, plain[::-1]))
    p = torch.ones_like(z) if label is None else label.to(z.dtype)
    if loss_type != "robust":
        p = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return p * won + (1 - p) * lost


@dataclass(kw_only=True)
class LogitConfig(PairLossConfig):
    """Settings of the methods built on the logit of Diffusion-DPO."""

    beta_dpo: float = field(
        5000.0,
        help="Pull to the reference, on mean squared errors with the factor 1/2. Paper: 2000 (SD1.5), 5000 (SDXL).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("beta_dpo", self.beta_dpo > 0, "above 0")


@dataclass(kw_only=True)
class DPOConfig(LogitConfig):
    """Settings of Diffusion-DPO."""

    loss_type: LossType = field("sigmoid", help="Loss on the logit.")
    label_smoothing: float = field(0.0, help="Share of labels taken to be wrong, below 0.5.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        if self.loss_type == "robust" and self.label_smoothing == 0:
            raise UserError("loss_type robust needs label_smoothing, the share of flipped labels; at 0 it is sigmoid")


Logit = TypeVar("Logit", bound=LogitConfig)


class LogitTrainer(PairTrainer[Logit]):
    """A method built on the logit of Diffusion-DPO."""

    def logit(self, errors: PairErrors) -> Tensor:
        """z of each pair, (B,)."""
        return dpo_logit(*errors.against_reference, beta=self.config.beta_dpo)

    def facts(self) -> Mapping[str, str]:
        beta = self.config.beta_dpo
        elements = self.batches.latent_elements
        note = ""
        if not 100 <= beta <= 20000:
            note = (
                "; this is far from the 2000 to 5000 of the paper. A beta such as 0.1 belongs to sums of log "
                "probabilities of text; a beta without the factor 1/2 must be doubled here"
            )
        return {"beta": f"{beta:g} on mean squared errors with the factor 1/2 ({beta / elements:.4g} on sums){note}"}


DPO = TypeVar("DPO", bound=DPOConfig)


class DPOLossTrainer(LogitTrainer[DPO]):
    """The loss of Diffusion-DPO, for whichever captions."""

    def loss(self, errors: PairErrors) -> tuple[Tensor, dict[str, Tensor]]:
        z, config = self.logit(errors), self.config
        losses = preference_loss(z, config.loss_type, errors.label, config.label_smoothing, config.beta_dpo)
        return losses, {"margin": z.mean()}


class DPOTrainer(DPOLossTrainer[DPOConfig]):
    """Trains with Diffusion-DPO."""

    method = "dpo"
    paper = """@inproceedings{wallace2024diffusion,
  title={Diffusion Model Alignment Using Direct Preference Optimization},
  author={Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron and Purushwalkam, Senthil
          and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and Naik, Nikhil},
  booktitle={CVPR},
  year={2024}
}"""
