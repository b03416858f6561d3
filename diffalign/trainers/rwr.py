"""DDPO-RWR: reward-weighted regression, the denoising loss on one's own images weighted by their reward.

Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024, arXiv 2305.13301, its section on
reward-weighted regression (after Lee et al. 2023, arXiv 2302.12192, and Peters & Schaal 2007):

    L = E w(x_0, c) |target - policy(x_t, t, c)|^2,      w = exp(beta A) / Z,  or  w = [A is among the best]

What differs from the paper: the weight takes the advantage A, not the raw reward, so beta has the same meaning for
every reward; Z makes the weights of a rollout average to 1. The sparse form keeps the best share of the rollout, which
on rewards that are not compared within groups is the global selection of RAFT (Dong et al. 2023, arXiv 2304.06767).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.config import field
from diffalign.diffusion.error import per_sample_mse
from diffalign.diffusion.random import keyed_uniform
from diffalign.training.online import OnlineBatch, OnlineNeeds, Rollout
from diffalign.training.renoise import ForwardConfig, ForwardTrainer
from diffalign.training.scoring import pad_and_gather


def regression_weights(
    advantages: Tensor, beta: float, form: Literal["exponential", "sparse"], share: float
) -> Tensor:
    """Weights of N images, (N,), with mean 1; 0 where the advantage is not finite.

    Args:
        advantages: (N,).
        beta: inverse temperature of the exponential form.
        form: "exponential" or "sparse".
        share: of the images that the sparse form keeps, in (0, 1]; ties at the edge are all kept.
    """
    finite = torch.isfinite(advantages)
    a = torch.where(finite, advantages, float("-inf"))
    if form == "exponential":
        weights = torch.softmax(beta * a, 0) * len(a)
    else:
        count = max(1, round(share * int(finite.sum())))
        kept = (a >= a.sort(descending=True).values[count - 1]).float()
        weights = kept * (len(a) / kept.sum())
    return torch.where(finite, weights, 0)


@dataclass(kw_only=True)
class RWRConfig(ForwardConfig):
    """Settings of DDPO-RWR."""

    rwr_weights: Literal["exponential", "sparse"] = field(
        "exponential", help="Weight by exp(beta A), or keep the best."
    )
    rwr_beta: float = field(1.0, help="Inverse temperature of the exponential weights, on advantages.")
    rwr_share: float = field(0.25, help="Share of the images that sparse weights keep.")
    proportion_empty_prompts: float = field(
        0.1, help="Share of images trained with an empty prompt, or guidance stops working after a few rollouts."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("rwr_beta", self.rwr_beta > 0, "above 0")
        self._require("rwr_share", 0 < self.rwr_share <= 1, "in (0, 1]")
        self._require("proportion_empty_prompts", 0 <= self.proportion_empty_prompts <= 1, "in [0, 1]")


class RWRTrainer(ForwardTrainer[RWRConfig]):
    """Trains with DDPO-RWR."""

    method = "rwr"
    needs: ClassVar[OnlineNeeds] = OnlineNeeds()
    paper = """@inproceedings{black2024training,
  title={Training Diffusion Models with Reinforcement Learning},
  author={Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey},
  booktitle={ICLR},
  year={2024}
}"""

    def collect(self, number: int) -> Rollout:
        drawn = super().collect(number)
        config, place = self.config, drawn.draws.place
        # An image without a reward has advantage 0, which is not what it deserves here.
        known = torch.where(torch.isfinite(drawn.scored.total), drawn.scored.advantages, torch.nan)
        whole = pad_and_gather(self.accelerator, place.tolist(), known[:, None], self.arithmetic.images)[:, 0]
        weights = regression_weights(whole, config.rwr_beta, config.rwr_weights, config.rwr_share)
        drawn.scored.weight = weights[place].float()
        self.stats["effective_images"] = float(weights.sum() ** 2 / weights.square().sum())
        return drawn

    def compute_loss(self, batch: OnlineBatch) -> tuple[Tensor, dict[str, Tensor]]:
        given = self.renoised(batch)
        text = self._with_dropout(batch)
        pred = self.family.predict(self.policy.denoiser, given.x_t, given.timesteps, text, batch.given.sizes)
        errors = per_sample_mse(pred, given.target)
        return (batch.weight * errors).mean(), {"error": errors.mean().detach()}

    def _with_dropout(self, batch: OnlineBatch) -> dict[str, Tensor]:
        """The prompts' embeddings, some replaced by the unconditional ones."""
        keys = [("prompt dropout", *sample) for sample in batch.samples]
        dropped = (keyed_uniform(keys) < self.config.proportion_empty_prompts).to(batch.latents.device)
        return {
            name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), self.unconditional[name].to(value), value)
            for name, value in batch.given.text.items()
        }
