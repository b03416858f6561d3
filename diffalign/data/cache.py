"""Latents and text embeddings, encoded once and kept on disk.

An entry's key is made of the picture's content, where it lands (:attr:`Placement.key`: scale, crop, flip) and the
VAE's fingerprint, or of the prompt and the text encoders' fingerprint. So another model, resolution or crop never
meets a stale entry, equal pictures and prompts are encoded once, and all runs share one folder. Interrupted work is
kept up to the last shard.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from diffalign.data.encoding import Encoder, Job, encode_pictures, encode_prompts, picture_key, prompt_key
from diffalign.data.exchange import Exchange
from diffalign.data.geometry import Geometry, Placement
from diffalign.data.images import BadImage
from diffalign.data.items import CachedItems
from diffalign.data.plans import Plan, plan_record, plan_source, require_some, restore_plan
from diffalign.data.records import Record
from diffalign.data.shards import ShardStore, cache_folder, default_cache_dir, digest
from diffalign.data.sources import Source, Stream
from diffalign.errors import UserError

__all__ = ["build_cache", "default_cache_dir"]

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_STREAM_CHUNK = 256
"""Records of a stream that are held in memory at once."""


def build_cache(
    source: Source[Any] | Stream[Any],
    family: Encoder,
    cache_dir: str | Path | None = None,
    *,
    geometry: Geometry,
    encode_text: bool = True,
    latent_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    batch_size: int = 8,
    text_batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] | None = None,
    progress: bool = True,
) -> CachedItems:
    """Encode what is not on disk yet, and return the records as training items.

    The VAE and the text encoders are loaded only if something is missing, and not freed here. Latents are the
    posterior's mean: one sample, drawn once and kept, would be noise that every epoch learns. A row with a bad picture
    is skipped and listed, up to the source's limit.

    Args:
        source: from :func:`diffalign.data.readers.open_pairs` or :func:`diffalign.data.labelled.open_images`.
        family: the model family (see :class:`diffalign.data.encoding.Encoder`).
        cache_dir: shared by runs, and by all processes of a run; :func:`default_cache_dir` by default.
        geometry: size, crop and flip, with the family's ``resolution_multiple``.
        encode_text: False where the text encoders are trained: items then hold prompts instead of embeddings.
        latent_dtype: how latents are stored. "float32" (the default) is exact; "float16" halves the space and rounds
            by at most 2^-11 of a value, "bfloat16" by 2^-9. Text embeddings are stored in the dtype they come in.
        batch_size, text_batch_size: pictures and prompts encoded at once.
        rank, world_size, barrier: this process, their number, and a function that returns once all have called it
            (``PartialState().wait_for_everyone``).
        progress: draw bars, on the first process.

    Raises:
        UserError: too many bad rows, nothing left, no space left, or latents that are not finite.
    """
    if latent_dtype not in DTYPES:
        raise UserError(f"latent_dtype {latent_dtype!r} is unknown. Choose one of {', '.join(DTYPES)}.")
    folder = cache_folder(cache_dir)
    exchange = Exchange(folder / "exchange", rank, world_size, barrier)
    builder = _Builder(
        family=family,
        geometry=geometry,
        dtype=DTYPES[latent_dtype],
        batch_sizes=(batch_size, text_batch_size),
        latents=_store(folder, family, "latents", "vae", latent_dtype),
        text=_store(folder, family, "text", "text_encoders", "as encoded"),
        encode_text=encode_text,
        exchange=exchange,
        progress=progress and rank == 0,
    )
    if isinstance(source, Stream):
        plans = source.select(builder.encode_stream(source))
    else:
        plans = plan_source(source, cache_dir=folder, exchange=exchange, progress=progress)
        plans = builder.encode_source(source, source.select(plans))
    if source.bad_rows.reasons:
        bad = len(source.bad_rows.reasons)
        logger.warning("%s: %d %s, %d bad rows skipped", source.name, len(plans), source.noun, bad)
    cached = builder.open(plans)
    exchange.close()
    return cached


def _store(folder: Path, family: Encoder, kind: str, part: str, dtype: str) -> ShardStore:
    fingerprint = family.fingerprint(part)
    about = {"kind": kind, f"{part} fingerprint": fingerprint, "dtype": dtype}
    return ShardStore(folder / kind / digest(fingerprint, dtype), about)


@dataclass
class _Builder:
    """The work of one process on one cache."""

    family: Encoder
    geometry: Geometry
    dtype: torch.dtype
    batch_sizes: tuple[int, int]
    latents: ShardStore
    text: ShardStore
    encode_text: bool
    exchange: Exchange
    progress: bool
    placed: dict[int, tuple[Placement, ...]] = field(default_factory=dict)

    def encode_source(self, source: Source[Any], plans: Sequence[Plan]) -> list[Plan]:
        """Encode what is missing, shared out between the processes; returns the plans of sound records."""
        self._prompts([prompt for prompt in self._missing_prompts(plans) if self._is_mine(prompt_key(prompt))])
        failed = self._pictures([job for job in self._jobs(plans) if self._is_mine(job.key)], source.__getitem__)
        reasons = dict(itertools.chain.from_iterable(self.exchange.share("failed", failed)))
        return self._sound(plans, reasons, source)

    def encode_stream(self, stream: Stream[Any]) -> list[Plan]:
        """Encode this process's records of a stream as they come; returns the plans of all."""
        rank, world_size = self.exchange.rank, self.exchange.world_size
        own = ((i, record) for i, record in enumerate(stream) if i % world_size == rank)
        plans: list[Plan] = []
        bar = tqdm(desc="caching a stream", unit=stream.noun, disable=not self.progress, leave=False)
        self.progress = False
        while chunk := dict(itertools.islice(own, _STREAM_CHUNK)):
            found = []
            for index, record in chunk.items():
                try:
                    found.append(plan_record(index, record))
                except BadImage as error:
                    stream.bad_rows.add(error)
            self._prompts(self._missing_prompts(found))
            plans += self._sound(found, dict(self._pictures(self._jobs(found), chunk.__getitem__)), stream)
            bar.update(len(chunk))
        bar.close()
        parts = self.exchange.share("plans", [asdict(plan) for plan in plans])
        return sorted(map(restore_plan, itertools.chain.from_iterable(parts)), key=lambda plan: plan.index)

    def open(self, plans: Sequence[Plan]) -> CachedItems:
        """The items, once every process has written its part."""
        self.exchange.share("written", True)
        require_some(plans)
        self.latents.refresh()
        self.text.refresh()
        if self.exchange.rank == 0:
            self._warn_truncated(list(dict.fromkeys(text for plan in plans for text in plan.texts)))
        placements = [self._place(plan) for plan in plans]
        pictures = list(itertools.chain.from_iterable(placements))
        if enlarged := sum(placement.enlarges for placement in pictures):
            logger.info("%d of %d pictures are smaller than the target and were enlarged", enlarged, len(pictures))
        latents, places = self.latents.reader(key for plan in plans for key in self._keys(plan))
        text = None
        if self.encode_text:
            reader, text_places = self.text.reader(map(prompt_key, self._all_prompts(plans)))
            text = reader, text_places.view(len(plans) + 1, -1, 2)
        return CachedItems(plans, placements, (latents, places.view(len(plans), -1, 2)), text)

    def _is_mine(self, key: str) -> bool:
        """Whether this process sees to a key. By the key alone, so that nothing is left over where another run adds
        entries meanwhile and the processes do not see the same ones missing."""
        return int(key, 16) % self.exchange.world_size == self.exchange.rank

    def _place(self, plan: Plan) -> tuple[Placement, ...]:
        if plan.index not in self.placed:
            self.placed[plan.index] = self.geometry.place(plan.id, *plan.sizes)
        return self.placed[plan.index]

    def _keys(self, plan: Plan) -> list[str]:
        return list(map(picture_key, plan.digests, self._place(plan)))

    def _jobs(self, plans: Sequence[Plan]) -> list[Job]:
        """The pictures that are not in the store, each once."""
        jobs: dict[str, Job] = {}
        for plan in plans:
            for side, key, placement in zip(plan.sides, self._keys(plan), self._place(plan), strict=True):
                if key not in self.latents:
                    jobs.setdefault(key, Job(key, plan.index, side, placement))
        return list(jobs.values())

    def _all_prompts(self, plans: Sequence[Plan]) -> Iterator[str]:
        """The texts of every plan, and as many empty ones at the end, for prompt dropout."""
        empty = [("",) * len(plan.texts) for plan in plans[:1]]
        return itertools.chain.from_iterable(itertools.chain((plan.texts for plan in plans), empty))

    def _missing_prompts(self, plans: Sequence[Plan]) -> list[str]:
        if not self.encode_text:
            return []
        return [prompt for prompt in dict.fromkeys(self._all_prompts(plans)) if prompt_key(prompt) not in self.text]

    def _sound(
        self, plans: Sequence[Plan], reasons: Mapping[str, str], source: Source[Any] | Stream[Any]
    ) -> list[Plan]:
        """The plans without a damaged picture; the others are bad rows."""
        sound = []
        for plan in plans:
            found = [reasons[key] for key in self._keys(plan) if key in reasons] if reasons else []
            if found:
                source.bad_rows.add(found[0])
            else:
                sound.append(plan)
        return sound

    def _prompts(self, prompts: Sequence[str]) -> None:
        encode_prompts(prompts, self.family, self.text, batch_size=self.batch_sizes[1], progress=self.progress)

    def _pictures(self, jobs: Sequence[Job], fetch: Callable[[int], Record]) -> list[tuple[str, str]]:
        return encode_pictures(
            jobs,
            fetch,
            self.family,
            self.latents,
            dtype=self.dtype,
            batch_size=self.batch_sizes[0],
            progress=self.progress,
        )

    def _warn_truncated(self, prompts: Sequence[str]) -> None:
        cut = self.family.truncated(prompts)
        if cut:
            logger.warning(
                "%d of %d different prompts are too long for the text encoders and are cut; the first: %r",
                len(cut),
                len(prompts),
                prompts[cut[0]],
            )
