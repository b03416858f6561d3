"""Batches of preference pairs: from the data on disk to latents, noise and timesteps on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.data.readers import open_pairs
from diffalign.diffusion.random import Key
from diffalign.pipelines import Family
from diffalign.training.config import PairConfig
from diffalign.training.samples import SampleBatches, Text, make_ready


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
    """Streams the pairs of a data set."""

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
            text=self.text(items, ("", ""), draws.dropped),
        )


def pair_batches(config: PairConfig, family: Family, accelerator: Accelerator) -> PairBatches:
    """Open the pairs of a config and make them ready: cached to disk (then VAE and text encoders are freed), or not.

    Raises:
        UserError: see :func:`diffalign.data.open_pairs` and :func:`diffalign.data.build_cache`.
    """
    source = open_pairs(
        config.dataset_name,
        split=config.dataset_split,
        columns=config.columns,
        ties=config.ties,
        streaming=config.streaming,
        max_bad_rows=config.max_bad_rows,
        max_pairs=config.max_train_samples,
    )
    return PairBatches(make_ready(source, config, family, accelerator), config, family, accelerator)
