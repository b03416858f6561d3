"""Batches of preference pairs: from the data on disk to latents, noise and timesteps on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from diffalign.data.cache import build_cache, default_cache_dir
from diffalign.data.geometry import Geometry
from diffalign.data.items import CachedPairs, PairItems, encode_on_the_fly
from diffalign.data.order import OrderSampler, PairOrder, collate
from diffalign.data.readers import open_pairs
from diffalign.diffusion.random import keyed_noise, keyed_uniform
from diffalign.pipelines import Family
from diffalign.training.config import PairConfig
from diffalign.training.loop import Batches

logger = logging.getLogger(__name__)

Text = dict[str, Tensor]


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


class PairBatches(Batches[PairBatch]):
    """Streams the pairs of a data set.

    Args:
        items: cached or on the fly, see :mod:`diffalign.data.items`.
        config, family, accelerator: of the run.
    """

    def __init__(self, items: PairItems, config: PairConfig, family: Family, accelerator: Accelerator) -> None:
        self.items, self.config, self.family = items, config, family
        self.device = accelerator.device
        self.rank = accelerator.process_index
        self.samples = len(items)
        self.latent_elements = prod(family.latent_shape(*items.targets[0]))
        self.order = PairOrder(
            items.bucket_of,
            seed=config.seed,
            train_batch_size=config.train_batch_size,
            world_size=accelerator.num_processes,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )

    def stream(self, start_step: int, stop_step: int) -> Iterator[PairBatch]:
        sampler = OrderSampler(self.order, start_step=start_step, stop_step=stop_step, rank=self.rank)
        workers = self.config.dataloader_num_workers
        loader = DataLoader(
            self.items,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )
        for index, items in enumerate(loader):
            yield self._batch(items, start_step + index // self.config.gradient_accumulation_steps)

    def _batch(self, items: dict[str, Any], step: int) -> PairBatch:
        def keys(purpose: str) -> list[tuple[int | str, ...]]:
            return [(self.config.seed, purpose, step, i) for i in items["id"].tolist()]

        latents = self._latents(items)
        noise = keyed_noise(keys("noise"), latents.shape[1:])
        timesteps = self.family.noise_process.sample_timesteps(keyed_uniform(keys("timestep")))
        dropped = keyed_uniform(keys("prompt dropout")) < self.config.proportion_empty_prompts
        return PairBatch(
            latents=latents,
            noise=torch.cat([noise, noise]).to(self.device),
            timesteps=torch.cat([timesteps, timesteps]).to(self.device),
            sizes=torch.cat([items["chosen_sizes"], items["rejected_sizes"]]).to(self.device),
            label=items["label"].to(self.device),
            text=self._text(items, dropped),
        )

    def _latents(self, items: dict[str, Any]) -> Tensor:
        if "chosen_latents" in items:
            return torch.cat([items["chosen_latents"], items["rejected_latents"]]).to(self.device)
        return self.family.encode_images(torch.cat([items["chosen_images"], items["rejected_images"]]))

    def _text(self, items: dict[str, Any], dropped: Tensor) -> Callable[[], Text]:
        """The prompt's embeddings for both halves; the empty prompt's where it is dropped."""
        if "prompt" in items:
            prompts = ["" if drop else prompt for prompt, drop in zip(items["prompt"], dropped.tolist(), strict=True)]

            def encode() -> Text:
                # Without gradient (inside the reference, or when only the denoiser trains) this keeps no graph.
                grad = self.config.train_text_encoder and torch.is_grad_enabled()
                encoded = self.family.encode_prompts(prompts, grad=grad, warn=False)
                return {name: torch.cat([value, value]) for name, value in encoded.items()}

            return encode
        assert isinstance(self.items, CachedPairs)
        text: Text = {}
        for name, value in items["text"].items():
            value[dropped] = self.items.empty_text[name]
            text[name] = torch.cat([value, value]).to(self.device)
        return lambda: text


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
    geometry = Geometry(
        config.resolution or family.default_resolution,
        multiple=family.resolution_multiple,
        crop="random" if config.random_crop else "center",
        flip=config.random_flip,
        buckets=config.aspect_ratio_buckets,
        seed=config.seed,
    )
    processes: dict[str, Any] = {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "barrier": accelerator.wait_for_everyone,
        "progress": accelerator.is_main_process,
    }
    items: PairItems
    if config.cache_latents:
        encode_text = not config.train_text_encoder
        items = build_cache(source, family, config.cache_dir, geometry=geometry, encode_text=encode_text, **processes)
        family.free("vae", "text_encoders")
    else:
        cache_dir = Path(config.cache_dir or default_cache_dir())
        items = encode_on_the_fly(source, geometry, cache_dir, **processes)
        if cut := family.truncated(items.prompts):
            logger.warning("%d of %d prompts are too long for the text encoders and are cut", len(cut), len(items))
    return PairBatches(items, config, family, accelerator)
