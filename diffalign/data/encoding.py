"""Pictures to latents and prompts to embeddings, in batches, into a store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.data.geometry import Placement, Size
from diffalign.data.images import BadImage
from diffalign.data.plans import in_parallel
from diffalign.data.records import Record
from diffalign.data.shards import ShardStore, digest, free_space, no_space
from diffalign.errors import UserError

logger = logging.getLogger(__name__)

_PIXELS_AT_ONCE = 1024 * 1024


class Encoder(Protocol):
    """What the cache asks of a model family."""

    def encode_images(self, images: Tensor, /) -> Tensor:
        """(B, 3, H, W) in [0, 1] to scaled latents (B, C, h, w): the posterior's mean."""

    def encode_prompts(self, prompts: Sequence[str], /, *, warn: bool) -> dict[str, Tensor]:
        """B prompts to tensors whose first dimension is B."""

    def truncated(self, prompts: Sequence[str], /) -> list[int]:
        """Indices of the prompts that are too long."""

    def fingerprint(self, part: str, /) -> str:
        """An id of "vae" or "text_encoders", without loading them."""


@dataclass(frozen=True)
class Job:
    """One picture to encode: attribute ``side`` of the record at ``index`` in the source."""

    key: str
    index: int
    side: str
    placement: Placement


def picture_key(content: str, placement: Placement) -> str:
    """Key of a latent in the store of one VAE."""
    return digest(content, placement.key)


def images_at_once(height: int, width: int) -> int:
    """Pictures of one size that the VAE sees at once: SDXL's takes 2.5 GB for each of 1024 x 1024."""
    return max(1, _PIXELS_AT_ONCE // (height * width))


def prompt_key(prompt: str) -> str:
    """Key of a prompt in the store of one set of text encoders."""
    return digest(prompt)


def encode_prompts(
    prompts: Sequence[str], encoder: Encoder, store: ShardStore, *, batch_size: int, progress: bool
) -> None:
    """Encode prompts that are not in the store.

    Raises:
        UserError: embeddings that are not finite, or no space left.
    """
    with keeping(store), _bar("encoding prompts", len(prompts), progress) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            text = {name: tensor.cpu() for name, tensor in encoder.encode_prompts(batch, warn=False).items()}
            for row, prompt in enumerate(batch):
                entry = {name: tensor[row] for name, tensor in text.items()}
                _check_finite(entry, f"the embedding of the prompt {prompt!r}", "Load the text encoders")
                store.put(prompt_key(prompt), entry)
            bar.update(len(batch))


def encode_pictures(
    jobs: Sequence[Job],
    fetch: Callable[[int], Record],
    encoder: Encoder,
    store: ShardStore,
    *,
    dtype: torch.dtype,
    batch_size: int,
    progress: bool,
) -> list[tuple[str, str]]:
    """Decode and encode pictures; those of one size are encoded together.

    Args:
        jobs: pictures that are not in the store.
        fetch: the record at an index, called from several threads.
        dtype: in which latents are stored.
        batch_size: pictures encoded at once; fewer where they are large, see :func:`images_at_once`.

    Returns:
        (key, reason) of every picture that turned out to be damaged.

    Raises:
        UserError: latents that are not finite, or no space left.
    """
    failed: list[tuple[str, str]] = []
    waiting: dict[Size, list[tuple[Job, str, Tensor]]] = {}
    left = len(jobs)  # neither encoded nor failed

    def load(job: Job) -> tuple[Job, str, Tensor | BadImage]:
        image = getattr(fetch(job.index), job.side)
        try:
            return job, image.name, job.placement.pixels(image.decode())
        except BadImage as error:
            return job, image.name, error

    def encode(batch: list[tuple[Job, str, Tensor]]) -> None:
        nonlocal left
        latents = encoder.encode_images(torch.stack([pixels for *_, pixels in batch])).cpu()
        _check_space(store, left * latents[0].numel() * dtype.itemsize)
        for (job, name, _), latent in zip(batch, latents, strict=True):
            _check_finite({"latents": latent}, f"{name}: its latent", "Load the VAE")
            _check_finite({"latents": latent.to(dtype)}, f"{name}: its latent in {dtype}", "Store latents")
            store.put(job.key, {"latents": latent.to(dtype)})
        left -= len(batch)

    with keeping(store), _bar("encoding pictures", left, progress) as bar:
        for job, name, pixels in in_parallel(load, jobs):
            if isinstance(pixels, BadImage):
                failed.append((job.key, str(pixels)))
                left -= 1
            else:
                batch = waiting.setdefault(job.placement.target, [])
                batch.append((job, name, pixels))
                if len(batch) >= min(batch_size, images_at_once(*job.placement.target)):
                    encode(waiting.pop(job.placement.target))
            bar.update()
        for batch in waiting.values():
            encode(batch)
    return failed


@contextmanager
def keeping(store: ShardStore) -> Iterator[None]:
    """Write what is pending at the end, also when interrupted, so that the next run goes on from there."""
    try:
        yield
    except BaseException:
        with suppress(UserError):  # a full disk, most likely what interrupted
            store.flush()
        raise
    store.flush()


def _bar(name: str, total: int, progress: bool) -> tqdm:
    return tqdm(desc=name, total=total, disable=not progress or not total, leave=False)


def _check_finite(entry: dict[str, Tensor], name: str, remedy: str) -> None:
    for tensor in entry.values():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{name} is not finite (NaN or infinity). {remedy} in float32 or bfloat16.")


def _check_space(store: ShardStore, needed: int) -> None:
    """Find a disk that is too small before hours are spent on filling it."""
    if free_space(store.folder) < needed:
        raise no_space(store.folder, needed)
