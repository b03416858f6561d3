"""DCPO: preference pairs whose two images are each described by a caption of their own.

Saeidi et al., "Dual Caption Preference Optimization for Diffusion Models", 2025, arXiv 2502.06023. The objective is
Diffusion-DPO's (:mod:`diffalign.trainers.dpo`) with other conditioning: policy and reference see the chosen image
under its caption z_w and the rejected one under z_l, so that the rejected image is no longer judged under a prompt
that does not describe it. With z_w = z_l = prompt it is Diffusion-DPO, bit for bit.

The captions are made beforehand by `diffalign captions` and are part of the data (docs/data.md).

What differs from the published code: SDXL gets both captions (there it reads one and repeats it); the target is the
one the checkpoint was made for, where the code trains v-prediction models on the noise (``epsilon_target`` does so
for reproduction); prompts can be dropped for guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.config import field
from diffalign.trainers.dpo import DPOConfig, DPOLossTrainer
from diffalign.training.pairs import Captions, PairBatch


@dataclass(kw_only=True)
class DCPOConfig(DPOConfig):
    """Settings of DCPO."""

    beta_dpo: float = field(
        500.0, help="Pull to the reference, on mean squared errors with the factor 1/2. Published code: 500."
    )
    epsilon_target: bool = field(
        False,
        help="Regress the noise whatever the checkpoint predicts, as the published code did with SD 2.1. Only to "
        "reproduce it: a v-prediction model is damaged by it.",
    )


class DCPOTrainer(DPOLossTrainer[DCPOConfig]):
    """Trains with DCPO."""

    method = "dcpo"
    captions: ClassVar[Captions] = "own"
    paper = """@article{saeidi2025dual,
  title={Dual Caption Preference Optimization for Diffusion Models},
  author={Saeidi, Amir and Luo, Yiran and others},
  journal={arXiv preprint arXiv:2502.06023},
  year={2025}
}"""

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        x_t, target = super().noised(batch)
        return x_t, batch.noise if self.config.epsilon_target else target

    def facts(self) -> Mapping[str, str]:
        items = self.batches.items
        chosen, rejected = items.own_captions
        note = "" if items.double_captions else "; all equal their prompts, so this is Diffusion-DPO"
        return {
            **super().facts(),
            "captions": f"{chosen} of {len(items)} chosen and {rejected} of {len(items)} rejected images have their "
            f"own, the others take the prompt{note}",
        }
