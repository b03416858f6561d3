"""ORPO: the denoising loss on the chosen image with a ratio term, without a reference.

Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", EMNLP 2024, arXiv 2403.07691, for
text. A squared error is minus a log-probability, so for diffusion models the ratio term compares errors:

    L = E[ m_w - beta log sigmoid( T (m_l - m_w) ) ]

with m = |target - policy(x_t, t)|^2, a mean over the latent's elements, both images noised with the same noise to the
same timestep.

What differs: the script that diffusers published has the other sign and no temperature, log sigmoid(m_w - m_l), so
its ratio term makes the chosen image likelier to be forgotten (``orpo_form published`` is that loss, for
comparison). The paper's log-odds need log(1 - p), which no one has got to train on diffusion models; this is the
ratio of likelihoods. The temperature is ours: differences of errors are about 0.01, and without it the term is flat.
Ties can be kept: they weigh both orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.config import field
from diffalign.training.loop import Needs
from diffalign.training.pair_loss import PairErrors, PairLossConfig, PairTrainer, both_orders

Form = Literal["corrected", "published"]


def orpo_logit(m_w: Tensor, m_l: Tensor, temperature: float = 250.0, form: Form = "corrected") -> Tensor:
    """The argument of the sigmoid, (B,): ``T (m_l - m_w)``, or as published ``m_w - m_l``."""
    return temperature * (m_l - m_w) if form == "corrected" else m_w - m_l


def orpo_loss(
    m_w: Tensor, m_l: Tensor, beta: float = 0.1, temperature: float = 250.0, form: Form = "corrected"
) -> Tensor:
    """The loss of each pair, (B,).

    Args:
        m_w, m_l: policy error on the chosen and on the rejected image, (B,): means of squares per sample.
        beta: weight of the ratio term.
        temperature: T, factor on the difference of errors; not used by the published form.
        form: "corrected", or "published" with the sign of the diffusers script.
    """
    return m_w - beta * logsigmoid(orpo_logit(m_w, m_l, temperature, form))


@dataclass(kw_only=True)
class ORPOConfig(PairLossConfig):
    """Settings of ORPO."""

    beta_orpo: float = field(0.1, help="Weight of the ratio term. Script of diffusers: 0.1.")
    orpo_temperature: float = field(
        250.0, help="Factor on the difference of mean squared errors in the corrected form. None is published."
    )
    orpo_form: Form = field(
        "corrected",
        help="Sign of the ratio term: corrected, or that of the diffusers script, which favours the rejected image.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("beta_orpo", self.beta_orpo > 0, "above 0")
        self._require("orpo_temperature", self.orpo_temperature > 0, "above 0")


class ORPOTrainer(PairTrainer[ORPOConfig]):
    """Trains with ORPO."""

    method = "orpo"
    needs: ClassVar[Needs] = Needs(reference=False, policy_passes=2)
    paper = """@inproceedings{hong2024orpo,
  title={{ORPO}: Monolithic Preference Optimization without Reference Model},
  author={Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle={EMNLP},
  year={2024}
}"""

    def loss(self, errors: PairErrors) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config

        def loss(e: PairErrors) -> Tensor:
            return orpo_loss(e.m_w, e.m_l, config.beta_orpo, config.orpo_temperature, config.orpo_form)

        margin = orpo_logit(errors.m_w, errors.m_l, config.orpo_temperature, config.orpo_form).detach()
        return both_orders(loss, errors), {
            "margin": margin.mean(),
            "margin_loss": -config.beta_orpo * logsigmoid(margin).mean(),
        }
