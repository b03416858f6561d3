"""CPO: contrastive preference optimisation, a logit without a reference beside the denoising loss.

Xu et al., "Contrastive Preference Optimization", ICML 2024, arXiv 2401.08417, for text; for diffusion models as
written in Gambashidze et al., "Aligning Diffusion Models with Noise-Conditioned Perception", 2024, arXiv 2406.17636:

    L = E[ -log sigmoid( -beta (m_w - m_l) ) + alpha m_w ]

with m = |target - policy(x_t, t)|^2, a mean over the latent's elements, both images noised with the same noise to the
same timestep. Nothing bounds m_l, which grows; :mod:`diffalign.trainers.mapo` is the bounded relative of this loss.

What differs: no settings were published for diffusion models. The defaults here (beta 250, the slope of MaPO's margin,
and alpha 1) are ours. Ties can be kept: they weigh both orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.config import field
from diffalign.training.loop import Needs
from diffalign.training.pair_loss import PairErrors, PairLossConfig, PairTrainer, both_orders


def cpo_loss(m_w: Tensor, m_l: Tensor, beta: float = 250.0, alpha: float = 1.0) -> Tensor:
    """The loss of each pair, (B,).

    Args:
        m_w, m_l: policy error on the chosen and on the rejected image, (B,): means of squares per sample.
        beta: factor on the difference of errors, without the 1/2 of DPO.
        alpha: weight of the denoising loss on the chosen image.
    """
    return -logsigmoid(-beta * (m_w - m_l)) + alpha * m_w


@dataclass(kw_only=True)
class CPOConfig(PairLossConfig):
    """Settings of CPO."""

    beta_cpo: float = field(250.0, help="Factor on the difference of mean squared errors. None is published.")
    cpo_alpha: float = field(1.0, help="Weight of the denoising loss on the chosen image.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("beta_cpo", self.beta_cpo > 0, "above 0")
        self._require("cpo_alpha", self.cpo_alpha >= 0, "0 or more")


class CPOTrainer(PairTrainer[CPOConfig]):
    """Trains with CPO."""

    method = "cpo"
    needs: ClassVar[Needs] = Needs(reference=False, policy_passes=2)
    paper = """@inproceedings{xu2024contrastive,
  title={Contrastive Preference Optimization: Pushing the Boundaries of {LLM} Performance in Machine Translation},
  author={Xu, Haoran and others},
  booktitle={ICML},
  year={2024}
}"""

    def loss(self, errors: PairErrors) -> tuple[Tensor, dict[str, Tensor]]:
        beta, alpha = self.config.beta_cpo, self.config.cpo_alpha
        losses = both_orders(lambda e: cpo_loss(e.m_w, e.m_l, beta, alpha), errors)
        return losses, {"margin": (-beta * (errors.m_w - errors.m_l)).mean()}
