"""What batches of pairs and of single images share: items on the device, keyed randomness, text that can train."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from diffalign.data.cache import build_cache, default_cache_dir
from diffalign.data.geometry import Geometry
from diffalign.data.items import CachedItems, Items, encode_on_the_fly
from diffalign.data.order import OrderSampler, SampleOrder, collate
from diffalign.data.sources import Source, Stream
from diffalign.diffusion.random import Key, keyed_noise, keyed_uniform
from diffalign.pipelines import Family
from diffalign.training.ahead import read_ahead
from diffalign.training.config import DataConfig
from diffalign.training.loop import Batches

logger = logging.getLogger(__name__)

Text = dict[str, Tensor]
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch of B samples, keyed by seed, purpose, step and sample."""

    noise: Tensor
    """Unit Gaussian, (B, C, h, w)."""
    timesteps: Tensor
    """(B,)."""
    dropped: Tensor
    """Samples whose prompt is dropped, bool (B,)."""


class SampleBatches(Batches[Batch]):
    """Streams the samples of a data set, in the order of :class:`diffalign.data.order.SampleOrder`.

    Args:
        items: cached or on the fly, see :mod:`diffalign.data.items`.
        config, family, accelerator: of the run.
        weights: how often each sample is drawn, see :class:`SampleOrder`.
    """

    def __init__(
        self,
        items: Items,
        config: DataConfig,
        family: Family,
        accelerator: Accelerator,
        weights: Tensor | None = None,
    ) -> None:
        self.items, self.config, self.family = items, config, family
        self.device = accelerator.device
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.samples = len(items)
        self.latent_elements = prod(family.latent_shape(*items.targets[0]))
        self.order = SampleOrder(
            items.bucket_of,
            seed=config.seed,
            train_batch_size=config.train_batch_size,
            world_size=self.world_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            weights=weights,
            sequential=config.data_order == "sequential",
        )

    @abstractmethod
    def make_batch(self, items: dict[str, Any], samples: list[Key]) -> Batch:
        """A batch of collated items; ``samples`` are what :meth:`draw` takes."""

    def stream(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        batches = self._batches(start_step, stop_step)
        # What is not cached is encoded on the device, where it would get in the way of the step.
        return read_ahead(batches) if isinstance(self.items, CachedItems) else batches

    def _batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        sampler = OrderSampler(self.order, start_step=start_step, stop_step=stop_step, rank=self.rank)
        workers = self.config.dataloader_num_workers
        loader = DataLoader(
            self.items,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            # Otherwise it draws from the global stream, of which the dropout of the first step is made: a resumed
            # run would differ.
            generator=torch.Generator(),
        )
        accumulation = self.config.gradient_accumulation_steps
        for index, items in enumerate(loader):
            step, micro_batch = start_step + index // accumulation, index % accumulation
            first = (micro_batch * self.world_size + self.rank) * self.config.train_batch_size
            yield self.make_batch(items, self.sample_keys(items["id"].tolist(), step, first))

    def trial(self) -> tuple[Batch, str]:
        areas = [height * width for height, width in self.items.targets]
        bucket = max(set(self.items.bucket_of), key=lambda number: areas[number])
        own = [index for index, number in enumerate(self.items.bucket_of) if number == bucket]
        chosen = [own[i % len(own)] for i in range(self.config.train_batch_size)]
        items = collate([self.items[index] for index in chosen])
        height, width = self.items.targets[bucket]
        return self.make_batch(items, self.sample_keys(items["id"].tolist(), 0, 0)), f"{height} x {width} pixels"

    def sample_keys(self, ids: list[int], step: int, first: int) -> list[Key]:
        """What tells the samples of a micro-batch apart; ``first`` is the place in the step of the first of them."""
        return [(step, name) for name in ids]

    def draw(self, samples: list[Key], latents: Tensor) -> Draws:
        """The random numbers of samples, with noise for ``latents`` (..., C, h, w)."""

        def keys(purpose: str) -> list[Key]:
            return [(self.config.seed, purpose, *sample) for sample in samples]

        return Draws(
            noise=keyed_noise(keys("noise"), latents.shape[1:]),
            timesteps=self.family.noise_process.sample_timesteps(keyed_uniform(keys("timestep"))),
            dropped=keyed_uniform(keys("prompt dropout")) < self.config.proportion_empty_prompts,
        )

    def latents(self, items: dict[str, Any], sides: Sequence[str]) -> Tensor:
        """Clean latents of the named pictures ("chosen_", "rejected_", or ""), one after the other."""
        if f"{sides[0]}latents" in items:
            return torch.cat([items[f"{side}latents"] for side in sides]).to(self.device)
        return self.family.encode_images(torch.cat([items[f"{side}images"] for side in sides]))

    def text(self, items: dict[str, Any], sides: Sequence[str], dropped: Tensor) -> Callable[[], Text]:
        """Text embeddings of the named captions, one after the other; the empty prompt's where ``dropped``.

        Args:
            sides: "" for the sample's prompt, "chosen_" and "rejected_" for the captions of single pictures.
            dropped: bool (B,), the same for each side.
        """
        if "prompt" in items:
            captions = {side: blank(items[f"{side}prompt"], dropped) for side in sides}

            def encode() -> Text:
                # Without gradient (inside the reference, or when only the denoiser trains) this keeps no graph.
                grad = self.config.train_text_encoder and torch.is_grad_enabled()
                encoded = {s: self.family.encode_prompts(c, grad=grad, warn=False) for s, c in captions.items()}
                return {name: torch.cat([encoded[side][name] for side in sides]) for name in encoded[sides[0]]}

            return encode
        assert isinstance(self.items, CachedItems)
        empty = self.items.empty_text
        text: Text = {}
        for name in items[f"{sides[0]}text"]:
            parts = {side: items[f"{side}text"][name] for side in sides}
            for part in parts.values():
                part[dropped] = empty[name]
            text[name] = torch.cat([parts[side] for side in sides]).to(self.device)
        return lambda: text


def blank(prompts: Sequence[str], dropped: Tensor) -> list[str]:
    """The prompts, "" where ``dropped``, bool (B,)."""
    return ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]


def make_ready(
    source: Source[Any] | Stream[Any], config: DataConfig, family: Family, accelerator: Accelerator
) -> Items:
    """Turn a source into items: cached to disk (then VAE and text encoders are freed), or encoded on the fly.

    Raises:
        UserError: see :func:`diffalign.data.cache.build_cache`.
    """
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
    if config.cache_latents:
        encode_text = not config.train_text_encoder
        cached = build_cache(source, family, config.cache_dir, geometry=geometry, encode_text=encode_text, **processes)
        family.free("vae", "text_encoders")
        return cached
    cache_dir = Path(config.cache_dir or default_cache_dir())
    items = encode_on_the_fly(source, geometry, cache_dir, **processes)
    if cut := family.truncated(items.prompts):
        logger.warning("%d of %d prompts are too long for the text encoders and are cut", len(cut), len(items))
    return items
