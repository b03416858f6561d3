"""Training items: the same layout from the cache and on the fly.

An item is a dict of tensors, stacked by :data:`diffalign.data.order.collate`:

==================================  ===========================================================================
``id``                              int64 (): hash of the pair's id, for keys of random numbers
``chosen_sizes, rejected_sizes``    int64 (6,): original h, w, crop top, left, target h, w, in pixels
``label``                           float32 (): probability that chosen is preferred, in [0.5, 1]
``margin``                          float32 (), only where the set has margins; NaN where a row has none
``chosen_latents, rejected_latents``  cached: float32 (C, h, w), scaled
``text``                            cached: dict of the family's text tensors of the prompt, in their dtype
``chosen_text, rejected_text``      cached: those of the single pictures, only where the set has such captions
``chosen_images, rejected_images``  on the fly: float32 (3, H, W) in [0, 1]
``prompt``                          on the fly, or where text encoders are trained: the prompt, a string;
                                    ``chosen_prompt, rejected_prompt`` only where the set has such captions
==================================  ===========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffalign.data.exchange import Exchange
from diffalign.data.geometry import Geometry, Placement, sizes_tensor
from diffalign.data.plans import Plan, plan_source
from diffalign.data.readers import PairSource, PairStream
from diffalign.data.shards import ShardReader, cache_folder
from diffalign.diffusion.random import key_seed
from diffalign.errors import UserError

SIDES = ("chosen", "rejected")
Placements = Sequence[tuple[Placement, Placement]]


class PairItems(Dataset[dict[str, Any]]):
    """What both kinds of items share.

    ``ids`` and ``prompts`` are the pairs' own. ``bucket_of`` says which of ``targets`` (height, width) each has: what
    :class:`diffalign.data.order.PairOrder` takes.
    """

    def __init__(self, plans: Sequence[Plan], placements: Placements) -> None:
        if not plans:
            raise UserError("no pairs are left: every one has a picture that cannot be used (listed above).")
        self.ids = [plan.id for plan in plans]
        self.prompts = [plan.prompt for plan in plans]
        self._captions = [plan.captions for plan in plans]
        self.double_captions = any(captions[1:] != captions[:1] * 2 for captions in self._captions)
        self.own_captions = tuple(sum(getattr(p, f"{s}_prompt") is not None for p in plans) for s in SIDES)
        self.uncaptioned = [p.id for p in plans if p.chosen_prompt is None and p.rejected_prompt is None]
        self._hashes = torch.tensor([key_seed("pair", plan.id) for plan in plans])
        self._labels = torch.tensor([plan.label for plan in plans], dtype=torch.float32)
        margins = [math.nan if plan.margin is None else plan.margin for plan in plans]
        self._margins = None if all(map(math.isnan, margins)) else torch.tensor(margins, dtype=torch.float32)
        self._sizes = torch.stack([sizes_tensor(pair) for pair in placements])
        self.targets = sorted({pair[0].target for pair in placements})
        numbers = {target: number for number, target in enumerate(self.targets)}
        self.bucket_of = [numbers[pair[0].target] for pair in placements]

    def __len__(self) -> int:
        return len(self.ids)

    def _common(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {
            "id": self._hashes[index],
            "chosen_sizes": self._sizes[index, 0],
            "rejected_sizes": self._sizes[index, 1],
            "label": self._labels[index],
        }
        if self._margins is not None:
            item["margin"] = self._margins[index]
        return item

    def _add_prompts(self, item: dict[str, Any], index: int) -> None:
        names = ("prompt", "chosen_prompt", "rejected_prompt") if self.double_captions else ("prompt",)
        item.update(zip(names, self._captions[index], strict=False))


class CachedPairs(PairItems):
    """Latents and text embeddings from disk; made by :func:`diffalign.data.cache.build_cache`.

    Args:
        plans, placements: of the pairs, in order.
        latents: a reader, and places (n, 2, 2): of chosen and rejected, as (shard, row).
        text: a reader, and places (n + 1, 3, 2): of the prompt and the captions of chosen and rejected; the last row
            is the empty prompt. None where items hold prompts instead.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        placements: Placements,
        latents: tuple[ShardReader, Tensor],
        text: tuple[ShardReader, Tensor] | None,
    ) -> None:
        super().__init__(plans, placements)
        self._latents, self._text = latents, text

    @property
    def empty_text(self) -> dict[str, Tensor]:
        """The text tensors of the empty prompt, for prompt dropout, without a batch dimension."""
        if self._text is None:
            raise ValueError("these items hold prompts, not embeddings; encode the empty prompt with the family")
        reader, places = self._text
        return reader.get(*places[-1, 0].tolist())

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._common(index)
        reader, places = self._latents
        for name, place in zip(("chosen", "rejected"), places[index].tolist(), strict=True):
            item[f"{name}_latents"] = reader.get(*place)["latents"].float()
        if self._text is None:
            self._add_prompts(item, index)
            return item
        reader, places = self._text
        names = ("text", "chosen_text", "rejected_text") if self.double_captions else ("text",)
        for name, place in zip(names, places[index].tolist(), strict=False):
            item[name] = reader.get(*place)
        return item


class EncodedOnTheFly(PairItems):
    """Pixels and prompts, for whoever encodes them in each step; made by :func:`encode_on_the_fly`."""

    def __init__(self, source: PairSource, plans: Sequence[Plan], placements: Placements) -> None:
        super().__init__(plans, placements)
        self._source, self._plans, self._placements = source, plans, placements

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The item. Raises BadImage where a picture is damaged in a way that only decoding shows."""
        item = self._common(index)
        pair = self._source[self._plans[index].index]
        chosen, rejected = self._placements[index]
        item["chosen_images"] = chosen.pixels(pair.chosen.decode())
        item["rejected_images"] = rejected.pixels(pair.rejected.decode())
        self._add_prompts(item, index)
        return item


def encode_on_the_fly(
    source: PairSource | PairStream,
    geometry: Geometry,
    cache_dir: str | Path | None = None,
    *,
    thorough: bool = False,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] | None = None,
    progress: bool = True,
) -> EncodedOnTheFly:
    """Items without a cache of latents: every picture is looked at once, before training, and decoded in each step.

    Args:
        source: pairs with random access.
        geometry: size, crop and flip.
        cache_dir: where the looks are remembered (no pixels, no latents); all processes share it. By default as for
            :func:`diffalign.data.cache.build_cache`.
        thorough: decode every picture at the look, which also finds damage in the middle of a file.
        rank, world_size, barrier: this process, their number, and a function that returns once all have called it.

    Raises:
        UserError: a streamed source, too many bad rows, or no pairs left.
    """
    if isinstance(source, PairStream):
        raise UserError(
            f"{source.name} is streamed, and encoding on the fly needs random access. "
            "Let it be cached, or do not stream it (max_pairs takes a part)."
        )
    folder = cache_folder(cache_dir)
    exchange = Exchange(folder / "exchange", rank, world_size, barrier)
    plans = plan_source(source, cache_dir=folder, exchange=exchange, thorough=thorough, progress=progress)
    exchange.close()
    placements = [geometry.place(plan.id, *plan.sizes) for plan in plans]
    return EncodedOnTheFly(source, plans, placements)
