"""Batches of single images, and what the methods that learn from them share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.config import field
from diffalign.data.items import Items
from diffalign.data.labelled import Both, open_images
from diffalign.diffusion.error import per_sample_mse
from diffalign.diffusion.random import Key
from diffalign.errors import UserError
from diffalign.pipelines import Family
from diffalign.training.config import DataConfig
from diffalign.training.loop import Trainer
from diffalign.training.samples import SampleBatches, Text, blank, make_ready

logger = logging.getLogger(__name__)


@dataclass
class ImageBatch:
    """B images, ready for a loss; noise and timestep are each image's own."""

    latents: Tensor
    """Clean latents, (B, C, h, w)."""
    noise: Tensor
    """Unit Gaussian noise, (B, C, h, w)."""
    timesteps: Tensor
    """(B,)."""
    sizes: Tensor
    """Original size, crop corner and target size of each image, (B, 6)."""
    label: Tensor
    """Probability that the image is liked, (B,) in [0, 1]; NaN where nobody said."""
    weight: Tensor
    """Weight of each image's loss, (B,), 0 or more."""
    prompts: list[str]
    """What each image is conditioned on: its caption, or "" where the prompt is dropped."""
    text: Callable[[], Text]
    """Text embeddings, B rows; a call, as in :class:`diffalign.training.pairs.PairBatch`."""


@dataclass(kw_only=True)
class ImageConfig(DataConfig):
    """The settings of every method that learns from single images. Pairs give two: one liked, one disliked."""

    merge_duplicates: bool = field(True, help="Take images of equal content and prompt as one.")
    liked_and_disliked: Both = field(
        "liked", help="What an image is that won some comparisons and lost others (Diffusion-KTO's intersections)."
    )


def sampler_weights(liked: Tensor, positive_ratio: float) -> Tensor:
    """How often to draw each image so that a share of the draws are liked: ``g N / n_1`` and ``(1 - g) N / n_0``.

    Args:
        liked: bool (N,), n_1 of them true.
        positive_ratio: g, in (0, 1).

    Returns:
        (N,), float64, with mean 1.

    Raises:
        UserError: all images are liked, or none is.
    """
    likes = int(liked.sum())
    dislikes = len(liked) - likes
    if not likes or not dislikes:
        raise UserError(
            f"of {len(liked)} images {likes} are liked and {dislikes} disliked; both kinds are needed. Check the "
            "column label (1 liked, 0 disliked), and that max_train_samples does not cut one kind off."
        )
    n = len(liked)
    return torch.where(liked, positive_ratio * n / likes, (1 - positive_ratio) * n / dislikes).double()


class ImageBatches(SampleBatches[ImageBatch]):
    """Streams the images of a data set.

    Args:
        items, config, family, accelerator: as for :class:`SampleBatches`.
        positive_ratio: draw with replacement so that this share is liked; None for every image equally often.
    """

    def __init__(
        self,
        items: Items,
        config: ImageConfig,
        family: Family,
        accelerator: Accelerator,
        positive_ratio: float | None = None,
    ) -> None:
        labels = items.numbers.get("label", torch.full((len(items),), torch.nan))
        self.likes, self.dislikes = int((labels > 0.5).sum()), int((labels < 0.5).sum())
        weights = None if positive_ratio is None else sampler_weights(labels > 0.5, positive_ratio)
        super().__init__(items, config, family, accelerator, weights)

    def sample_keys(self, ids: list[int], step: int, first: int) -> list[Key]:
        # An image may be drawn twice in a step: its place in the step keeps noise and timestep apart.
        return [(step, name, first + row) for row, name in enumerate(ids)]

    def make_batch(self, items: dict[str, Any], samples: list[Key]) -> ImageBatch:
        latents = self.latents(items, ("",))
        draws = self.draw(samples, latents)
        nobody_said = torch.full((len(latents),), torch.nan)
        return ImageBatch(
            latents=latents,
            noise=draws.noise.to(self.device),
            timesteps=draws.timesteps.to(self.device),
            sizes=items["sizes"].to(self.device),
            label=items.get("label", nobody_said).to(self.device),
            weight=items["weight"].to(self.device),
            prompts=blank(self.items.captions(items["id"].tolist()), draws.dropped),
            text=self.text(items, ("",), draws.dropped),
        )


def image_batches(
    config: ImageConfig,
    family: Family,
    accelerator: Accelerator,
    *,
    keep: Literal["all", "labelled", "liked"],
    positive_ratio: float | None = None,
) -> ImageBatches:
    """The batches of a config's images.

    Args:
        config, family, accelerator: of the run.
        keep: see :func:`diffalign.data.labelled.open_images`.
        positive_ratio: see :class:`ImageBatches`.

    Raises:
        UserError: see :func:`image_items`; or only one kind of label where a share is asked for.
    """
    return ImageBatches(image_items(config, family, accelerator, keep), config, family, accelerator, positive_ratio)


def image_items(
    config: ImageConfig, family: Family, accelerator: Accelerator, keep: Literal["all", "labelled", "liked"]
) -> Items:
    """Open the images of a config and make them ready: cached to disk (then VAE and text encoders are freed), or not.

    Raises:
        UserError: see :func:`diffalign.data.labelled.open_images` and :func:`diffalign.data.cache.build_cache`.
    """
    source = open_images(
        config.dataset_name,
        split=config.dataset_split,
        config_name=config.dataset_config_name,
        columns=config.columns,
        keep=keep,
        merge=config.merge_duplicates,
        both=config.liked_and_disliked,
        rankings=config.rankings,
        seed=config.seed,
        streaming=config.streaming,
        max_bad_rows=config.max_bad_rows,
        max_samples=config.max_train_samples,
    )
    return make_ready(source, config, family, accelerator)


Image = TypeVar("Image", bound=ImageConfig)


class ImageTrainer(Trainer[Image, ImageBatch]):
    """A method that learns from single images."""

    batches: ImageBatches

    def policy_error(self, batch: ImageBatch) -> Tensor:
        """Denoising error of the policy on each image, (B,), with gradient."""
        text = batch.text()
        return self._error(self.policy.denoiser, batch, text)

    def errors(self, batch: ImageBatch, roll: int = 0) -> tuple[Tensor, Tensor]:
        """Denoising errors (m, r) of the policy and of the reference on each image, (B,) each.

        Args:
            roll: condition image i on the caption of image i - roll.
        """
        with self.policy.reference() as reference:
            r = self._error(reference, batch, _rolled(batch.text(), roll))
        return self._error(self.policy.denoiser, batch, _rolled(batch.text(), roll)), r

    def _error(self, denoiser: torch.nn.Module, batch: ImageBatch, text: Text) -> Tensor:
        process = self.family.noise_process
        x_t = process.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = process.target(batch.latents, batch.noise, batch.timesteps)
        return per_sample_mse(self.family.predict(denoiser, x_t, batch.timesteps, text, batch.sizes), target)


def _rolled(text: Text, roll: int) -> Text:
    return {name: value.roll(roll, 0) for name, value in text.items()} if roll else text
