"""How far the images of a model are from real ones as a whole: FID and KID, by torchmetrics.

Preference tuning usually raises both, and what people prefer goes the other way: they say how far a model has moved,
not how good it is. FID is biased at few images (10,000 are usual); KID is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.evaluation.folder import Case, SampleFolder
from diffalign.evaluation.listing import list_images

T = TypeVar("T")
SIDE = 299
"""Pixels a side that Inception v3 sees."""
_BATCH = 32
_SUBSET = 1000


def distances(
    reference: str | None, folders: Mapping[T, SampleFolder], cases: Sequence[Case], device: str | None = None
) -> dict[T, dict[str, float]]:
    """FID, KID and the standard deviation of KID over its subsets, of each model's images; {} without a reference.

    Args:
        reference: folder of real images, or any source that :func:`diffalign.evaluation.listing.list_images` takes.

    Raises:
        UserError: torchmetrics is not installed, or fewer than two images are there.
    """
    if reference is None:
        return {}
    fid, kid = make_metrics(min(len(cases), len(real := list_images([reference])), _SUBSET))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for metric in (fid, kid):
        metric.to(place)
        for batch in _batches(_opened(image.path) for image in real):
            metric.update(batch.to(place), real=True)
    found = {}
    for key, folder in folders.items():
        for metric in (fid, kid):
            metric.reset()
            for batch in _batches(folder.image(case) for case in cases):
                metric.update(batch.to(place), real=False)
        # KID draws its subsets at random.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mean, spread = kid.compute()
        found[key] = {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(spread)}
    return found


def make_metrics(subset: int, feature: Any = 2048) -> tuple[Any, Any]:
    """FID and KID of torchmetrics, which keep the statistics of the real images when they are reset.

    Args:
        subset: images in a subset of KID, >= 2.
        feature: layer of Inception v3, or a module (B, 3, 299, 299) uint8 -> (B, d) in its place.

    Raises:
        UserError: torchmetrics or its Inception v3 is not installed, or the subset is too small.
    """
    if subset < 2:
        raise UserError("FID and KID need at least two images of each model and two reference images")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        return (
            FrechetInceptionDistance(feature, reset_real_features=False),
            KernelInceptionDistance(feature, subsets=50, subset_size=subset, reset_real_features=False),
        )
    except ModuleNotFoundError as error:
        raise UserError(
            f"reference_images needs torchmetrics with its Inception v3 ({error}): pip install 'diffalign[fid]'"
        ) from error


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"the reference image {path} cannot be read: {error}") from error


def _batches(images: Iterable[Image.Image]) -> Iterator[Tensor]:
    """uint8 batches (B, 3, 299, 299), resized by Pillow's antialiased bicubic (Parmar et al. 2022, "clean FID")."""
    batch = []
    for image in images:
        small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        batch.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
        if len(batch) == _BATCH:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)
