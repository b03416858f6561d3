"""How pictures become pixels: one target size, one crop and one flip for both pictures of a pair.

A picture is scaled until it just covers the target, then cropped. Crop and flip are drawn from a key (seed, purpose,
sample id), so they are fixed for a sample: another epoch sees the same crop and the same flip, with caches on or off.
They enter the key of a cache entry, so that another choice never reuses a stale one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string
from PIL import Image
from torch import Tensor

from diffalign.diffusion.random import keyed_uniform
from diffalign.errors import UserError

VERSION = 1
"""Raised whenever the pixels of a placement change, so that older cache entries are left alone."""

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Placement:
    """Where one picture lands: scaled from ``original`` to ``resized``, flipped, then cropped to ``target``.

    ``top`` and ``left`` are the crop's corner in the scaled (and flipped) picture, as SDXL counts it.
    """

    original: Size
    resized: Size
    top: int
    left: int
    target: Size
    flip: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """(original_h, original_w, crop_top, crop_left, target_h, target_w), pixels: SDXL's order."""
        return (*self.original, self.top, self.left, *self.target)

    @property
    def key(self) -> str:
        """Everything that decides the pixels, beside the picture itself."""
        return f"v{VERSION} {self.resized} {self.top} {self.left} {self.target} {self.flip}"

    @property
    def enlarges(self) -> bool:
        """Whether the picture is smaller than the target and had to be enlarged."""
        return self.resized[0] > self.original[0] or self.resized[1] > self.original[1]

    def pixels(self, image: Image.Image) -> Tensor:
        """The picture's pixels: (3, target_h, target_w), float32, in [0, 1]."""
        height, width = self.original
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale_y, scale_x = height / self.resized[0], width / self.resized[1]
        box = (
            self.left * scale_x,
            self.top * scale_y,
            min((self.left + self.target[1]) * scale_x, width),
            min((self.top + self.target[0]) * scale_y, height),
        )
        image = image.resize(self.target[::-1], Image.Resampling.LANCZOS, box=box)
        return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))[0]


@dataclass(frozen=True)
class Geometry:
    """The size, crop and flip of a run.

    Args:
        resolution: target side in pixels; a pair (height, width) for a target that is not square.
        multiple: what target sides must be divisible by (the VAE's factor).
        crop: "center", or "random" (drawn once per sample).
        flip: mirror half of the samples, drawn once per sample.
        buckets: None for one target; "auto" for a ladder of aspect ratios with about resolution^2 pixels; or a
            list "height,width;height,width". A sample goes to the bucket nearest to the geometric mean of
            its pictures' aspect ratios.
        seed: the run's seed.

    Raises:
        UserError: a side that is not positive or not divisible by ``multiple``, an unknown crop, malformed buckets.
    """

    resolution: int | Size
    multiple: int = 8
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    buckets: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop not in ("center", "random"):
            raise UserError(f"unknown crop {self.crop!r}. Choose 'center' or 'random'.")
        for target in self.targets:
            for side in target:
                if side <= 0 or side % self.multiple:
                    below = max(side // self.multiple, 1) * self.multiple
                    raise UserError(
                        f"a side of {side} pixels is not divisible by {self.multiple}, the factor of this model's "
                        f"VAE. Choose {below} or {below + self.multiple}."
                    )

    @cached_property
    def targets(self) -> tuple[Size, ...]:
        """Every target size (height, width) that a sample may get: the buckets, in order."""
        square = self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)
        if self.buckets is None:
            return (square,)
        if self.buckets == "auto":
            side = round((square[0] * square[1]) ** 0.5)
            # 64 pixels is the usual step of aspect-ratio buckets; a small world would have no buckets left with it.
            step = 64 if side >= 512 and 64 % self.multiple == 0 else self.multiple
            return tuple(generate_aspect_ratio_buckets(side, step))
        try:
            return tuple(parse_buckets_string(self.buckets))
        except ValueError as error:
            raise UserError(
                f"buckets {self.buckets!r}: {error} Write 'auto', or for example '1024,1024;832,1216'."
            ) from error

    def place(self, sample_id: str, *sizes: Size) -> tuple[Placement, ...]:
        """Place the pictures of a sample, given the (height, width) of each after EXIF orientation.

        All get the same target, the same flip and the same relative corner of the crop.
        """
        height, width = (math.prod(sides) ** (1 / len(sizes)) for sides in zip(*sizes, strict=True))
        target = self.targets[find_nearest_bucket(height, width, self.targets)] if self.buckets else self.targets[0]
        corner = (0.5, 0.5)
        if self.crop == "random":
            rows = [(self.seed, "crop_top", sample_id), (self.seed, "crop_left", sample_id)]
            corner = tuple(keyed_uniform(rows).tolist())
        flip = self.flip and bool(keyed_uniform([(self.seed, "flip", sample_id)])[0] < 0.5)
        return tuple(_cover(size, target, corner, flip) for size in sizes)


def _cover(size: Size, target: Size, corner: tuple[float, float], flip: bool) -> Placement:
    scale = max(target[0] / size[0], target[1] / size[1])
    resized = (max(round(size[0] * scale), target[0]), max(round(size[1] * scale), target[1]))
    top = round(corner[0] * (resized[0] - target[0]))
    left = round(corner[1] * (resized[1] - target[1]))
    return Placement(size, resized, top, left, target, flip)


def sizes_tensor(placements: Sequence[Placement]) -> Tensor:
    """Sizes of several placements: (len, 6), int64, see :attr:`Placement.sizes`."""
    return torch.tensor([placement.sizes for placement in placements], dtype=torch.int64)
