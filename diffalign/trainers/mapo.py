"""MaPO: learn from preference pairs without a reference model.

Hong, Paul et al., "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference", 2024,
arXiv 2406.06424. The denoising loss on the chosen image, plus a margin between bounded scores of the two:

    phi(m) = s m / (exp(s m) - 1)            in (0, 1], decreasing; s = snr_value
    z      = T (phi(m_w) - phi(m_l))         T = mapo_temperature
    L      = E[ m_w - beta log sigmoid(z) ]

with m = |target - policy(x_t, t)|^2, a mean over the latent's elements, both images noised with the same noise to the
same timestep. Because phi flattens for large errors, very bad images stop pushing. For small errors z is about
T s / 2 (m_l - m_w), so T s corresponds to a beta_dpo without a reference: 500 by default.

What differs from the paper: this is the authors' code. Version 2 of the paper writes one number, beta, as temperature
and as inverse weight of the margin (1/beta, that is 0.001 at a temperature of 1000, where the code has 0.1); here
temperature and weight are two settings. The SNR weight is a constant in both. Small errors are computed without
cancellation, and ties can be kept: they weigh both orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.config import field
from diffalign.training.loop import Needs
from diffalign.training.pair_loss import PairErrors, PairLossConfig, PairTrainer, both_orders


def mapo_score(error: Tensor, snr_value: float = 0.5) -> Tensor:
    """The bounded score ``phi = x / (exp(x) - 1)`` of an error, with x = snr_value * error.

    Args:
        error: (B,), 0 or more, float32 or wider: at half precision the temperature turns rounding into units of z.
        snr_value: s, what stands in for the weight by signal-to-noise ratio.

    Returns:
        (B,) in (0, 1]; 1 at an error of 0, about 1 - x/2 below 0.1.
    """
    x = snr_value * error
    small = x < 1e-2
    # Both the quotient and its derivative are differences of large numbers near 0; the series is exact to 1e-16 there.
    series = 1 - x / 2 + x.square() / 12 - x.pow(4) / 720
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, series, safe / torch.expm1(safe))


def mapo_logit(m_w: Tensor, m_l: Tensor, snr_value: float = 0.5, temperature: float = 1000.0) -> Tensor:
    """The margin ``z = T (phi(m_w) - phi(m_l))``, (B,): above 0 where the chosen image is denoised better."""
    return temperature * (mapo_score(m_w, snr_value) - mapo_score(m_l, snr_value))


def mapo_loss(
    m_w: Tensor, m_l: Tensor, beta: float = 0.1, snr_value: float = 0.5, temperature: float = 1000.0
) -> Tensor:
    """The loss of each pair, ``m_w - beta log sigmoid(z)``, (B,).

    Args:
        m_w, m_l: policy error on the chosen and on the rejected image, (B,): means of squares per sample.
        beta: weight of the margin term.
        snr_value: s of :func:`mapo_score`.
        temperature: T of :func:`mapo_logit`; the number of training timesteps in the authors' code.
    """
    return m_w - beta * logsigmoid(mapo_logit(m_w, m_l, snr_value, temperature))


@dataclass(kw_only=True)
class MaPOConfig(PairLossConfig):
    """Settings of MaPO."""

    beta_mapo: float = field(0.1, help="Weight of the margin beside the denoising loss. Authors' code: 0.1.")
    snr_value: float = field(0.5, help="Constant that stands in for the SNR weight in the score. Authors' code: 0.5.")
    mapo_temperature: float = field(
        1000.0, help="Factor on the difference of scores. Authors' code: 1000, the number of training timesteps."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_mapo", "snr_value", "mapo_temperature"):
            self._require(name, getattr(self, name) > 0, "above 0")


class MaPOTrainer(PairTrainer[MaPOConfig]):
    """Trains with MaPO."""

    method = "mapo"
    needs: ClassVar[Needs] = Needs(reference=False, policy_passes=2)
    paper = """@article{hong2024margin,
  title={Margin-aware Preference Optimization for Aligning Diffusion Models without Reference},
  author={Hong, Jiwoo and Paul, Sayak and others},
  journal={arXiv preprint arXiv:2406.06424},
  year={2024}
}"""

    def loss(self, errors: PairErrors) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config

        def loss(e: PairErrors) -> Tensor:
            return mapo_loss(e.m_w, e.m_l, config.beta_mapo, config.snr_value, config.mapo_temperature)

        chosen, rejected = (mapo_score(m.detach(), config.snr_value) for m in (errors.m_w, errors.m_l))
        margin = config.mapo_temperature * (chosen - rejected)
        return both_orders(loss, errors), {
            "margin": margin.mean(),
            "margin_loss": -config.beta_mapo * logsigmoid(margin).mean(),
            "chosen_score": chosen.mean(),
            "rejected_score": rejected.mean(),
        }
