"""Training items: the same layout from the cache and on the fly, for pairs and for single pictures.

An item is a dict of tensors, stacked by :data:`diffalign.data.order.collate`. The names that begin with a side are
those of a pair; the item of a single picture has them without it (``latents``, ``images``, ``sizes``).

==================================  ===========================================================================
``id``                              int64 (): hash of the sample's id, for keys of random numbers
``label``                           float32 (): of a pair, the probability that chosen is preferred, in [0.5, 1];
                                    of a picture, that it is liked, in [0, 1]
``margin``, ``weight``              float32 (), of pairs and of pictures; as ``label`` only where the set has them,
                                    NaN where a row has none
``chosen_sizes, rejected_sizes``    int64 (6,): original h, w, crop top, left, target h, w, in pixels
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
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffalign.data.exchange import Exchange
from diffalign.data.geometry import Geometry, Placement, sizes_tensor
from diffalign.data.plans import Plan, plan_source, require_some
from diffalign.data.shards import ShardReader, cache_folder
from diffalign.data.sources import Source, Stream
from diffalign.diffusion.random import key_seed
from diffalign.errors import UserError

Placements = Sequence[tuple[Placement, ...]]


class Items(Dataset[dict[str, Any]]):
    """What both kinds of items share.

    ``ids`` and ``prompts`` are the samples' own. ``bucket_of`` says which of ``targets`` (height, width) each has:
    what :class:`diffalign.data.order.SampleOrder` takes. ``numbers`` holds "label" and the like of all, (n,) each.
    ``own_captions`` counts the pictures of each side that have captions of their own, ``uncaptioned`` lists the ids of
    the pairs of which neither picture has, and ``double_captions`` is whether such captions differ from a prompt.
    """

    def __init__(self, plans: Sequence[Plan], placements: Placements) -> None:
        require_some(plans)
        self.ids = [plan.id for plan in plans]
        self.prompts = [plan.prompt for plan in plans]
        self._texts = [plan.texts for plan in plans]
        self.double_captions = any(text != plan.prompt for plan in plans for text in plan.texts)
        own = [[caption is not None for caption in plan.captions[1:]] for plan in plans]
        self.own_captions = tuple(map(sum, zip(*own, strict=True)))
        self.uncaptioned = [plan.id for plan, has in zip(plans, own, strict=True) if has and not any(has)]
        sides = plans[0].sides
        self._prefixes = [f"{side}_" for side in sides] if len(sides) > 1 else [""]
        self._hashes = torch.tensor([key_seed("pair", plan.id) for plan in plans])
        self.numbers: dict[str, Tensor] = {}
        for name in plans[0].numbers:
            values = [math.nan if (value := plan.numbers[name]) is None else value for plan in plans]
            if not all(map(math.isnan, values)):
                self.numbers[name] = torch.tensor(values, dtype=torch.float32)
        self._sizes = torch.stack([sizes_tensor(places) for places in placements])
        self.targets = sorted({places[0].target for places in placements})
        numbers = {target: number for number, target in enumerate(self.targets)}
        self.bucket_of = [numbers[places[0].target] for places in placements]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _prompt_of(self) -> dict[int, str]:
        return dict(zip(self._hashes.tolist(), self.prompts, strict=True))

    def captions(self, ids: Sequence[int]) -> list[str]:
        """The prompts of samples, by the ``id`` of their items; also where items hold embeddings alone."""
        return [self._prompt_of[name] for name in ids]

    def _common(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._hashes[index]}
        item |= {f"{prefix}sizes": sizes for prefix, sizes in zip(self._prefixes, self._sizes[index], strict=True)}
        return item | {name: values[index] for name, values in self.numbers.items()}

    def _text_prefixes(self) -> list[str]:
        return ["", *self._prefixes] if self.double_captions else [""]

    def _add_prompts(self, item: dict[str, Any], index: int) -> None:
        names = [f"{prefix}prompt" for prefix in self._text_prefixes()]
        item.update(zip(names, self._texts[index], strict=False))


class CachedItems(Items):
    """Latents and text embeddings from disk; made by :func:`diffalign.data.cache.build_cache`.

    Args:
        plans, placements: of n samples of k pictures, in order.
        latents: a reader, and places (n, k, 2) of the pictures, as (shard, row).
        text: a reader, and places (n + 1, number of texts, 2) of each plan's texts; the last row is the empty prompt.
            None where items hold prompts instead.
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
        for prefix, place in zip(self._prefixes, places[index].tolist(), strict=True):
            item[f"{prefix}latents"] = reader.get(*place)["latents"].float()
        if self._text is None:
            self._add_prompts(item, index)
            return item
        reader, places = self._text
        for prefix, place in zip(self._text_prefixes(), places[index].tolist(), strict=False):
            item[f"{prefix}text"] = reader.get(*place)
        return item


class ItemsOnTheFly(Items):
    """Pixels and prompts, for whoever encodes them in each step; made by :func:`encode_on_the_fly`."""

    def __init__(self, source: Source[Any], plans: Sequence[Plan], placements: Placements) -> None:
        super().__init__(plans, placements)
        self._source, self._plans, self._placements = source, plans, placements

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The item. Raises BadImage where a picture is damaged in a way that only decoding shows."""
        item, plan = self._common(index), self._plans[index]
        record = self._source[plan.index]
        for prefix, side, placement in zip(self._prefixes, plan.sides, self._placements[index], strict=True):
            item[f"{prefix}images"] = placement.pixels(getattr(record, side).decode())
        self._add_prompts(item, index)
        return item


def encode_on_the_fly(
    source: Source[Any] | Stream[Any],
    geometry: Geometry,
    cache_dir: str | Path | None = None,
    *,
    thorough: bool = False,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] | None = None,
    progress: bool = True,
) -> ItemsOnTheFly:
    """Items without a cache of latents: every picture is looked at once, before training, and decoded in each step.

    Args:
        source: records with random access.
        geometry: size, crop and flip.
        cache_dir: where the looks are remembered (no pixels, no latents); all processes share it. By default as for
            :func:`diffalign.data.cache.build_cache`.
        thorough: decode every picture at the look, which also finds damage in the middle of a file.
        rank, world_size, barrier: this process, their number, and a function that returns once all have called it.

    Raises:
        UserError: a streamed source, too many bad rows, or nothing left.
    """
    if isinstance(source, Stream):
        raise UserError(
            f"{source.name} is streamed, and encoding on the fly needs random access. "
            "Let it be cached, or do not stream it (max_train_samples takes a part)."
        )
    folder = cache_folder(cache_dir)
    exchange = Exchange(folder / "exchange", rank, world_size, barrier)
    plans = plan_source(source, cache_dir=folder, exchange=exchange, thorough=thorough, progress=progress)
    exchange.close()
    plans = source.select(plans)
    placements = [geometry.place(plan.id, *plan.sizes) for plan in plans]
    return ItemsOnTheFly(source, plans, placements)
