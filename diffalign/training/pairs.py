"""Batches of preference pairs: from the data on disk to latents, noise and timesteps on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.data.items import Items
from diffalign.data.readers import PairReading, PairSource, PairStream, open_pairs
from diffalign.diffusion.random import Key
from diffalign.errors import UserError
from diffalign.pipelines import Family
from diffalign.training.config import PairConfig
from diffalign.training.samples import SampleBatches, Text, make_ready

Captions = Literal["prompt", "own"]
"""What an image of a pair is conditioned on: the pair's prompt, or a caption of its own."""


@dataclass
class PairBatch:
    """B pairs, ready for a loss. Tensors of 2B rows hold the chosen halves first, then the rejected ones.

    One noise and one timestep per pair, the same in both halves.
    """

    latents: Tensor
    """Clean latents, (2B, C, h, w)."""
    noise: Tensor
    """Unit Gaussian noise, (2B, C, h, w)."""
    timesteps: Tensor
    """(2B,)."""
    sizes: Tensor
    """Original size, crop corner and target size of each image, (2B, 6)."""
    label: Tensor
    """Probability that the chosen image is preferred, (B,)."""
    text: Callable[[], Text]
    """Text embeddings of 2B rows. A call, because text encoders that train must run inside the step, once with and
    once without their adapters."""


class PairBatches(SampleBatches[PairBatch]):
    """Streams the pairs of a data set.

    Args:
        items, config, family, accelerator: as for :class:`SampleBatches`.
        captions: what the images are conditioned on.
    """

    def __init__(
        self,
        items: Items,
        config: PairConfig,
        family: Family,
        accelerator: Accelerator,
        captions: Captions = "prompt",
    ) -> None:
        super().__init__(items, config, family, accelerator)
        # Where every caption equals its prompt, the items hold the prompt only.
        self.own_captions = captions == "own" and items.double_captions

    def make_batch(self, items: dict[str, Any], samples: list[Key]) -> PairBatch:
        sides = ("chosen_", "rejected_")
        latents = self.latents(items, sides)
        draws = self.draw(samples, latents)
        return PairBatch(
            latents=latents,
            noise=torch.cat([draws.noise, draws.noise]).to(self.device),
            timesteps=torch.cat([draws.timesteps, draws.timesteps]).to(self.device),
            sizes=torch.cat([items[f"{side}sizes"] for side in sides]).to(self.device),
            label=items["label"].to(self.device),
            text=self.text(items, sides if self.own_captions else ("", ""), draws.dropped),
        )


def pair_batches(
    config: PairConfig, family: Family, accelerator: Accelerator, *, captions: Captions = "prompt"
) -> PairBatches:
    """Open the pairs of a config and make them ready: cached to disk (then VAE and text encoders are freed), or not.

    Args:
        config, family, accelerator: of the run.
        captions: what the images are conditioned on. With "own", a pair of which only one image has a caption takes
            the prompt for the other.

    Raises:
        UserError: see :func:`diffalign.data.open_pairs` and :func:`diffalign.data.build_cache`; or the images have no
            captions of their own where they are asked for.
    """
    source = open_pairs(
        config.dataset_name,
        split=config.dataset_split,
        config_name=config.dataset_config_name,
        columns=config.columns,
        ties=config.ties,
        rankings=config.rankings,
        seed=config.seed,
        streaming=config.streaming,
        max_bad_rows=config.max_bad_rows,
        max_pairs=config.max_train_samples,
    )
    if captions == "own":
        _require_caption_columns(source, config.dataset_name)
    items = make_ready(source, config, family, accelerator)
    if captions == "own" and items.uncaptioned:
        raise UserError(
            f"{source.name}: {len(items.uncaptioned)} of {len(items)} pairs have no caption for either image, the "
            f"first with id {items.uncaptioned[0]!r}. Make them with `diffalign captions`, or remove those rows."
        )
    return PairBatches(items, config, family, accelerator, captions)


def _require_caption_columns(source: PairSource | PairStream, name: str) -> None:
    """Refuse a set without captions of the single images before anything is encoded."""
    assert isinstance(source.reading, PairReading)
    if not source.reading.columns.double_captions:
        raise UserError(
            f"{source.name} has no captions of the single images, which this method learns from. Make them with "
            f"`diffalign captions {name} --captioner CAPTIONER --output_dir FOLDER` and train on FOLDER "
            "(`diffalign captions --help` lists captioners); or name the columns that hold them: "
            "columns: {chosen_prompt: ..., rejected_prompt: ...}."
        )
