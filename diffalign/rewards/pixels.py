"""CLIP's image preprocessing on tensors: what the library's processor does to a picture, differentiable.

Shortest edge to a size by antialiased bicubic interpolation, centre crop, mean and standard deviation. Without the
antialias the result is another metric: scores shift by up to 2 percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign.errors import UserError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as processor configs write it


@dataclass(frozen=True)
class Preprocess:
    """The steps of a CLIP image processor.

    ``size`` is the shortest edge and ``crop`` the side of the centre crop, in pixels; ``mean`` and ``std`` are of
    pixels in [0, 1].
    """

    size: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """From what a ``CLIPImageProcessor`` writes.

        Raises:
            UserError: it says to do something else than CLIP does.
        """
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        edge = size if isinstance(size, int) else size.get("shortest_edge")
        side = crop if isinstance(crop, int) else crop.get("height")
        known = (
            edge is not None
            and edge >= side
            and (isinstance(crop, int) or crop.get("width") == side)
            and config.get("resample", _BICUBIC) == _BICUBIC
            and all(config.get(step, True) for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"))
        )
        if not known:
            raise UserError(f"this image processor does other steps than CLIP's: {dict(config)}")
        mean, std = (tuple(config.get(key, default)) for key, default in _CONSTANTS)
        return cls(edge, side, mean, std)

    def __call__(self, images: Tensor, *, exact: bool = False) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to normalised pixels (B, 3, crop, crop), float32.

        Args:
            exact: clamp and round to 8 bits in the resize, as the library does on pictures. Leave it off where a
                gradient is wanted: both have none.
        """
        pixels = resize_shortest(images.float(), self.size, exact=exact)
        mean, std = (torch.tensor(value, device=pixels.device).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return (center_crop(pixels, self.crop) - mean) / std


_CONSTANTS = (("image_mean", OPENAI_MEAN), ("image_std", OPENAI_STD))


def resize_shortest(images: Tensor, size: int, *, exact: bool = False) -> Tensor:
    """Resize (B, C, H, W) by antialiased bicubic interpolation so that the shorter side is ``size``.

    ``exact`` keeps values in [0, 1] at 8 bits throughout. Pillow resizes along rows, rounds, and then along columns.
    """
    height, width = images.shape[-2:]
    target = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    if not exact:
        return images if min(height, width) == size else _bicubic(images, *target)
    return _to_8_bits(_bicubic(_to_8_bits(_bicubic(_to_8_bits(images), height, target[1])), *target))


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def _to_8_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def center_crop(images: Tensor, side: int) -> Tensor:
    """The middle ``side`` x ``side`` of (B, C, H, W), rounded down at the top and left as transformers does."""
    height, width = images.shape[-2:]
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]
