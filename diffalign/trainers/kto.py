"""Diffusion-KTO: learn from likes and dislikes of single images.

Li, Kallidromitis, Gokul et al., "Aligning Diffusion Models by Optimizing Human Utility", NeurIPS 2024,
arXiv 2404.04465. The implicit reward of Diffusion-DPO, for each image, against a reference point, through a utility
that saturates (its eq. 9):

    G_i  = r_i - m_i                                     how much better than the reference the policy denoises
    u_i  = s_i beta (G_i - KL),    s_i = +1 liked, -1 disliked
    L    = mean_i  w_i (1 - U(u_i))                      w_i = lambda_D if liked, lambda_U if not

with m_i = |target - policy(x_t, t)|^2 and r_i the reference's, means over the latent's elements, of images with their
own noise and timestep. U is the sigmoid (Kahneman and Tversky's), or one of two others of the paper. KL estimates how
far the policy is from the reference; it has no gradient.

What differs from the paper: the paper estimates KL on images with captions that are not theirs, and the authors' code,
by default, as the mean of G over the batch, not below 0; here the code's way is the default too
(``kl_estimate: batch``), over the batch of all processes, and the paper's is ``mismatched`` (without a bound, as in
the code). A moving average over
micro-batches can be taken, for small batches. Rows may have weights. beta multiplies G itself, without the factor 1/2
of Diffusion-DPO.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from diffalign.config import field
from diffalign.errors import UserError
from diffalign.training.images import ImageBatch, ImageBatches, ImageConfig, ImageTrainer, image_batches
from diffalign.training.loop import Needs

logger = logging.getLogger(__name__)

Utility = Literal["sigmoid", "loss_averse", "risk_seeking"]
KLEstimate = Literal["batch", "labels", "mismatched"]

SMALL_BATCH = 8
"""Below this many images the reference point follows the images themselves: the batch of the paper."""


def kto_utility(u: Tensor, utility: Utility = "sigmoid") -> Tensor:
    """U(u), elementwise.

    Args:
        u: ``s beta (G - KL)``.
        utility: "sigmoid", in (0, 1): gains and losses far from the reference point count no more; "loss_averse",
            log sigmoid(u), concave, so losses count without bound (unpaired DPO); "risk_seeking", -log sigmoid(-u),
            convex, so gains do, and the loss has no lower bound.
    """
    if utility == "sigmoid":
        return torch.sigmoid(u)
    return logsigmoid(u) if utility == "loss_averse" else softplus(u)


def kto_loss(
    gain: Tensor,
    liked: Tensor,
    kl: Tensor | float,
    beta: float,
    utility: Utility = "sigmoid",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The loss of each image, ``w_i (1 - U(u_i))``, (B,); the mean over images comes after.

    Args:
        gain: G = r - m, (B,).
        liked: bool (B,).
        kl: the reference point, without gradient.
        beta: on G itself, without the factor 1/2 of Diffusion-DPO.
        utility: see :func:`kto_utility`.
        desirable_weight, undesirable_weight: lambda_D and lambda_U.
    """
    sign = torch.where(liked, 1.0, -1.0).to(gain.dtype)
    weight = torch.where(liked, desirable_weight, undesirable_weight).to(gain.dtype)
    return weight * (1 - kto_utility(sign * beta * (gain - kl), utility))


def kl_sums(gain: Tensor, liked: Tensor) -> Tensor:
    """What :func:`kl_point` needs of a part of a batch, to be added up over processes: (4,), float64.

    Sum of G and number of images, of the liked ones and of the disliked ones.
    """
    gain, likes = gain.detach().double(), liked.double()
    return torch.stack([(gain * likes).sum(), likes.sum(), (gain * (1 - likes)).sum(), (1 - likes).sum()])


def kl_point(sums: Tensor, estimate: KLEstimate = "batch") -> Tensor:
    """The reference point before a bound: the mean of G, or the mean of the means over liked and over disliked images.

    Args:
        sums: of the whole batch, see :func:`kl_sums`.
        estimate: with "labels" a label that is absent does not count; otherwise labels play no part.
    """
    liked, likes, disliked, dislikes = sums
    if estimate != "labels":
        return (liked + disliked) / (likes + dislikes)
    means = [total / count for total, count in ((liked, likes), (disliked, dislikes)) if count > 0]
    return torch.stack(means).mean()


@dataclass(kw_only=True)
class KTOConfig(ImageConfig):
    """Settings of Diffusion-KTO."""

    beta_kto: float = field(
        5000.0, help="Pull to the reference, on mean squared errors without the factor 1/2. Paper: 5000 (SD1.5)."
    )
    utility: Utility = field("sigmoid", help="Utility of an image's gain; sigmoid is the paper's choice.")
    desirable_weight: float = field(1.0, help="Weight of liked images, lambda_D.")
    undesirable_weight: float = field(1.0, help="Weight of disliked images, lambda_U.")
    positive_ratio: float | None = field(
        0.8,
        help="Share of liked images in what is drawn, with replacement; none draws every image equally often. "
        "Paper: 0.8, and 0.2 diverged.",
    )
    kl_estimate: KLEstimate = field(
        "batch",
        help="Reference point: mean gain of the batch over all processes, not below 0 (the authors' default); mean of "
        "the means per label; or mean gain under captions of other images, for two more forward passes (the paper).",
    )
    kl_ema_decay: float = field(0.0, help="Decay of a moving average of the reference point, for small batches.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_kto", "desirable_weight", "undesirable_weight"):
            self._require(name, getattr(self, name) > 0, "above 0")
        ratio = self.positive_ratio
        self._require("positive_ratio", ratio is None or 0 < ratio < 1, "in (0, 1), or none")
        self._require("kl_ema_decay", 0 <= self.kl_ema_decay < 1, "in [0, 1)")
        if self.kl_estimate == "mismatched" and self.train_batch_size < 2:
            raise UserError(
                "kl_estimate mismatched takes another image's caption: it needs train_batch_size 2 or more"
            )
        if self.data_order == "sequential" and ratio is not None:
            raise UserError("positive_ratio draws at random, so data_order cannot be sequential: set it to none")


class KTOTrainer(ImageTrainer[KTOConfig]):
    """Trains with Diffusion-KTO."""

    method = "kto"
    needs = Needs(reference=True)
    paper = """@inproceedings{li2024aligning,
  title={Aligning Diffusion Models by Optimizing Human Utility},
  author={Li, Shufan and Kallidromitis, Konstantinos and Gokul, Akash and Kato, Yusuke and Kozuka, Kazuki},
  booktitle={NeurIPS},
  year={2024}
}"""
    kl_average: float | None = None
    """The moving average of the reference point, before the bound; None before the first batch."""

    def make_batches(self) -> ImageBatches:
        config = self.config
        batches = image_batches(
            config, self.family, self.accelerator, keep="labelled", positive_ratio=config.positive_ratio
        )
        together = config.train_batch_size * self.accelerator.num_processes
        if together < SMALL_BATCH and not config.kl_ema_decay:
            logger.warning(
                "the reference point is estimated on %d images; below %d it follows them, and liked images give "
                "little signal. Raise train_batch_size, use more processes, or set kl_ema_decay (0.9, say).",
                together,
                SMALL_BATCH,
            )
        share = self._liked_share(batches)
        if share < 0.5:
            logger.warning(
                "%.3g of the images in a batch are liked. Below 0.5 training may diverge, as it did at 0.2 in the "
                "paper; set positive_ratio to 0.8.",
                share,
            )
        return batches

    def compute_loss(self, batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        m, r = self.errors(batch)
        gain, liked = r - m, batch.label > 0.5
        kl = self._reference_point(batch, gain.detach(), liked)
        losses = kto_loss(
            gain, liked, kl, config.beta_kto, config.utility, config.desirable_weight, config.undesirable_weight
        )
        return (batch.weight * losses).mean(), self._report(gain.detach(), liked, kl, m.detach())

    def _reference_point(self, batch: ImageBatch, gain: Tensor, liked: Tensor) -> float:
        """KL of this micro-batch of all processes; equal on every process."""
        config = self.config
        if config.kl_estimate == "mismatched":
            with torch.no_grad():
                m, r = self.errors(batch, roll=1)
            gain = r - m
        # float32 is what every device and backend can add up.
        sums = self.accelerator.reduce(kl_sums(gain, liked).float(), "sum")
        kl = kl_point(sums, config.kl_estimate).item()
        if config.kl_ema_decay and math.isfinite(kl):
            before = kl if self.kl_average is None else self.kl_average
            kl = self.kl_average = config.kl_ema_decay * before + (1 - config.kl_ema_decay) * kl
        return max(0.0, kl) if config.kl_estimate == "batch" else kl

    def _report(self, gain: Tensor, liked: Tensor, kl: float, m: Tensor) -> dict[str, Tensor]:
        likes, sign = liked.float(), torch.where(liked, 1.0, -1.0)
        return {
            "kl": torch.tensor(kl, device=gain.device),
            "liked_gain": torch.stack([(gain * likes).sum(), likes.sum()]),
            "disliked_gain": torch.stack([(gain * (1 - likes)).sum(), (1 - likes).sum()]),
            "right_side": (sign * (gain - kl) > 0).float().mean(),
            "liked_share": likes.mean(),
            "error": m.mean(),
        }

    def _liked_share(self, batches: ImageBatches) -> float:
        ratio = self.config.positive_ratio
        return batches.likes / batches.samples if ratio is None else ratio

    def facts(self) -> Mapping[str, str]:
        config, batches = self.config, self.batches
        beta, elements = config.beta_kto, batches.latent_elements
        drawn = "every image equally often"
        if config.positive_ratio is not None:
            drawn = f"{config.positive_ratio:g} of them liked, with replacement"
        return {
            "beta": f"{beta:g} on mean squared errors without the factor 1/2, as beta_dpo {2 * beta:g} in DPO "
            f"({beta / elements:.4g} on sums); the utility saturates beyond a gain of {5 / beta:.2g}",
            "labels": f"{batches.likes:,} liked, {batches.dislikes:,} disliked; drawn: {drawn}",
            "reference point": f"{config.kl_estimate}, on {config.train_batch_size * self.accelerator.num_processes} "
            f"images" + (f", moving average {config.kl_ema_decay:g}" if config.kl_ema_decay else ""),
        }

    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "kl_average": self.kl_average}

    def load_weights(self, folder: Path, state: Mapping[str, Any]) -> None:
        super().load_weights(folder, state)
        self.kl_average = state["kl_average"]
