"""Supervised fine-tuning: the ordinary denoising loss, on images that are liked.

The first stage before other methods, and the baseline of every paper. With m_i = |target - policy(x_t, t)|^2, the mean
over the latent's elements, of images with their own noise and timestep (Ho et al. 2020, arXiv 2006.11239, eq. 14):

    L = mean_i  w_i lambda(t_i) m_i

w_i is the weight of the image's row (1 without one). lambda is 1, or with ``snr_gamma`` the min-SNR weight of Hang et
al. 2023 (arXiv 2303.09556, eq. 13): min(SNR, gamma) times 1, 1/SNR or 1/(SNR + 1) for a network that predicts x_0,
epsilon or v.

What differs between implementations: from pairs, the winners train (code of Diffusion-DPO); images that are disliked
are left out. ``disliked: mask`` keeps them in the batch with weight 0, as the code of Diffusion-KTO does: the sum is
still divided by the whole batch, so the effective learning rate scales with the share of likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.config import field
from diffalign.diffusion.noise import NoiseProcess
from diffalign.errors import UserError
from diffalign.training.images import ImageBatch, ImageBatches, ImageConfig, ImageTrainer, image_batches


def sft_loss(m: Tensor, weight: Tensor, label: Tensor | None = None) -> Tensor:
    """The weighted denoising loss of each image, (B,); its mean over B is the loss.

    Args:
        m: policy error of each image, (B,), a mean of squares.
        weight: (B,), 0 or more.
        label: how far an image is liked, (B,) in [0, 1], for the label-masked form; all 1 where None.
    """
    weighted = weight.to(m.dtype) * m
    return weighted if label is None else label.to(m.dtype) * weighted


def min_snr_weight(process: NoiseProcess, timesteps: Tensor, gamma: float) -> Tensor:
    """The min-SNR weight lambda(t) of an error on the network's own target, (B,), float32 on the timesteps' device.

    Args:
        process: whose prediction type decides the form; not a flow.
        timesteps: (B,).
        gamma: where the signal-to-noise ratio is cut, above 0; 5 in the paper.

    Raises:
        UserError: the process is a flow, for which the paper has no weight.
    """
    if process.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"snr_gamma is defined for models that predict epsilon, v or x_0, and this one predicts "
            f"{process.prediction_type}. Leave snr_gamma out."
        )
    snr = process.snr(timesteps)
    clipped = snr.clamp(max=gamma)
    if process.prediction_type == "epsilon":
        # min(snr, gamma) / snr, also where snr is 0.
        clipped = (gamma / snr).clamp(max=1.0)
    elif process.prediction_type == "v_prediction":
        clipped = clipped / (snr + 1)
    return clipped.to(timesteps.device, torch.float32)


@dataclass(kw_only=True)
class SFTConfig(ImageConfig):
    """Settings of supervised fine-tuning."""

    snr_gamma: float | None = field(None, help="Min-SNR weighting with this gamma; 5 in its paper. Default: none.")
    disliked: Literal["drop", "mask"] = field(
        "drop",
        help="What becomes of disliked images: left out, or kept in the batch with weight 0 (the label-masked form).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("snr_gamma", self.snr_gamma is None or self.snr_gamma > 0, "above 0")


class SFTTrainer(ImageTrainer[SFTConfig]):
    """Trains on single images."""

    method = "sft"
    paper = """@inproceedings{ho2020denoising,
  title={Denoising Diffusion Probabilistic Models},
  author={Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle={NeurIPS},
  year={2020}
}"""

    def make_batches(self) -> ImageBatches:
        if self.config.snr_gamma is not None:
            min_snr_weight(self.family.noise_process, torch.zeros(1, dtype=torch.int64), self.config.snr_gamma)
        keep: Literal["labelled", "liked"] = "labelled" if self.config.disliked == "mask" else "liked"
        return image_batches(self.config, self.family, self.accelerator, keep=keep)

    def compute_loss(self, batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
        m = self.policy_error(batch)
        weight = batch.weight
        if self.config.snr_gamma is not None:
            weight = weight * min_snr_weight(self.family.noise_process, batch.timesteps, self.config.snr_gamma)
        masked = self.config.disliked == "mask"
        report = {"error": m.detach().mean()}
        if masked:
            liked = (batch.label > 0.5).float()
            report |= {
                "liked_share": liked.mean(),
                "liked_error": torch.stack([(liked * m.detach()).sum(), liked.sum()]),
            }
        return sft_loss(m, weight, batch.label if masked else None).mean(), report

    def facts(self) -> Mapping[str, str]:
        batches = self.batches
        if self.config.disliked == "mask":
            share = batches.likes / batches.samples
            return {
                "labels": f"{batches.likes:,} liked and {batches.dislikes:,} disliked; the loss is divided by both, "
                f"so the learning rate acts like {share:.3g} of itself on liked images alone"
            }
        return {}
