"""Bounded DPO: the rejected image's share of the logit is bounded, so that unlearning it cannot pay for ever.

Cho et al., "Rethinking DPO: The Role of Rejected Responses in Preference Misalignment", 2025, arXiv 2506.12725, for
text, as used for diffusion models under the name Diff-BDPO. The policy's likelihood of the rejected image is mixed
with the reference's. With d = T m an error in nats (m the policy's, r the reference's mean squared error):

    margin_w = T (r_w - m_w)
    mix_l    = log( lambda exp(T (r_l - m_l)) + (1 - lambda) )          at least log(1 - lambda)
    L        = -E log sigmoid( beta/(2T) (margin_w - mix_l) )

At lambda = 1 this is Diffusion-DPO. T sets where the bound acts and beta the pull to the reference, in the units of
beta_dpo: an improvement of the chosen image counts as in DPO.

What differs: the diffusion form is known second-hand, with the opposite order of the margin's terms in print; here a
better policy has a larger margin. Ties can be kept: they weigh both orders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.config import field
from diffalign.trainers.dpo import LogitConfig, LogitTrainer
from diffalign.training.pair_loss import PairErrors, both_orders


def bdpo_logit(
    m_w: Tensor, m_l: Tensor, r_w: Tensor, r_l: Tensor, beta: float, mixing: float = 0.9, temperature: float = 1000.0
) -> Tensor:
    """The bounded logit, (B,).

    Args:
        m_w, m_l: policy error on the chosen and on the rejected image, (B,): means of squares per sample.
        r_w, r_l: the reference's, (B,).
        beta: pull to the reference, as :func:`diffalign.trainers.dpo.dpo_logit` has it.
        mixing: lambda, the policy's share of the mixture, in (0, 1]; 1 is Diffusion-DPO.
        temperature: T, nats to a unit of error.
    """
    mix_l = math.log(mixing) + temperature * (r_l - m_l)
    if mixing < 1:
        mix_l = torch.logaddexp(mix_l, torch.full_like(mix_l, math.log1p(-mixing)))
    return 0.5 * beta * ((r_w - m_w) - mix_l / temperature)


@dataclass(kw_only=True)
class BDPOConfig(LogitConfig):
    """Settings of bounded DPO."""

    bdpo_lambda: float = field(0.9, help="The policy's share of the mixture, in (0, 1]; 1 is Diffusion-DPO.")
    bdpo_temperature: float = field(
        1000.0, help="Nats to a unit of mean squared error: how soon the bound acts. 1000 is the number of timesteps."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("bdpo_lambda", 0 < self.bdpo_lambda <= 1, "in (0, 1]")
        self._require("bdpo_temperature", self.bdpo_temperature > 0, "above 0")


class BDPOTrainer(LogitTrainer[BDPOConfig]):
    """Trains with bounded DPO."""

    method = "bdpo"
    paper = """@inproceedings{cho2025rethinking,
  title={Rethinking {DPO}: The Role of Rejected Responses in Preference Misalignment},
  author={Cho, Jae Hyeon and Oh, JunHyeok and Kim, Myunsoo and Lee, Byung-Jun},
  booktitle={Findings of EMNLP},
  year={2025}
}"""

    def logit(self, errors: PairErrors) -> Tensor:
        config = self.config
        return bdpo_logit(
            *errors.against_reference,
            beta=config.beta_dpo,
            mixing=config.bdpo_lambda,
            temperature=config.bdpo_temperature,
        )

    def loss(self, errors: PairErrors) -> tuple[Tensor, dict[str, Tensor]]:
        return both_orders(lambda e: -logsigmoid(self.logit(e)), errors), {"margin": self.logit(errors).mean()}
