"""Image preprocessing of CLIP-like models on tensors: what each library's own does to a picture, differentiable.

Every resize is antialiased, said explicitly: without it the result is another metric, and scores shift by up to
2 percent. Against the libraries' own processing of the same 8-bit pictures (60 to 1344 pixels a side, wide and tall,
up- and downscaled, smooth with noise), mean and largest difference in units of the [0, 1] pixel:

| processing | ``exact`` | with gradient |
|---|---|---|
| crop or squash by transformers (CLIP, SigLIP; its default, torchvision) | 0, 0 | 0.0013, 0.022 |
| crop, squash or letterbox by Pillow (open_clip, or transformers with Pillow) | 1.3e-4, 0.008 | 0.0013, 0.022 |
| the same of tall pictures that lose over twice as many rows as columns | 0.001, 0.016 | 0.0013, 0.022 |
| letterbox of HPSv2, as its package does it on float tensors | 0, 0 | 0, 0 |

In the third row Pillow 13 resizes columns first, where torchvision and this module always start with rows; all round
to 8 bits in between. The first row is for a CPU; on a GPU, which cannot resize bytes, it is 7e-5, 0.008.
`tests/rewards/test_pixels.py` holds these limits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from diffalign.errors import UserError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_INTERPOLATIONS: dict[Any, Literal["bicubic", "bilinear"]] = {
    2: "bilinear",  # PIL.Image.Resampling, as processor configs of transformers write it
    3: "bicubic",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}


@dataclass(frozen=True)
class Preprocess:
    """The steps from a picture to what a model sees.

    Attributes:
        size: pixels that the shortest side ("crop"), the longest ("letterbox") or both ("squash") are resized to.
        crop: side of the square that comes out, in pixels.
        mean, std: of pixels in [0, 1].
        mode: "crop": shortest side to ``size``, then the middle; loses the borders. "letterbox": longest side to
            ``size``, then black around it. "squash": to a square, whatever the proportions.
        interpolation: of the resize.
        antialias: off only to get the numbers of libraries that forgot it (torchvision before 0.17 on tensors).
        eight_bit: the library resizes 8-bit pictures, rounding; ``exact`` then does too.
        crop_rounds: a half pixel of the crop "down" as transformers, or to "even" as torchvision and open_clip.
    """

    size: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    mode: Literal["crop", "letterbox", "squash"] = "crop"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    eight_bit: bool = True
    crop_rounds: Literal["down", "even"] = "down"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """From what the image processor of a CLIP or SigLIP writes in transformers.

        Raises:
            UserError: it says to do something else than these do.
        """
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        edges = {"shortest_edge": size} if isinstance(size, int) else dict(size)
        side = crop if isinstance(crop, int) else (crop or {}).get("height")
        square = None if isinstance(crop, int) or not crop else crop.get("width")
        interpolation = _INTERPOLATIONS.get(config.get("resample", 3))
        steps = all(config.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
        mean, std = (tuple(config.get(key) or default) for key, default in _CONSTANTS)
        if steps and interpolation and square in (None, side):
            edge = edges.get("shortest_edge")
            if edge is not None and side is not None and edge >= side and config.get("do_center_crop", True):
                return cls(edge, side, mean, std, interpolation=interpolation)
            height, cropped = edges.get("height"), config.get("do_center_crop") and side != edges.get("height")
            if height is not None and height == edges.get("width") and not cropped:
                return cls(height, height, mean, std, "squash", interpolation)
        raise UserError(f"this image processor does other steps than a CLIP's or SigLIP's: {dict(config)}")

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> Preprocess:
        """From the preprocessing config of an open_clip model.

        Raises:
            UserError: it says to do something else than these steps.
        """
        size, mode = config.get("size", 224), config.get("resize_mode", "shortest")
        side = size if isinstance(size, int) else (size[0] if len(set(size)) == 1 else None)
        kind = {"shortest": "crop", "longest": "letterbox", "squash": "squash"}.get(mode)
        interpolation = _INTERPOLATIONS.get(config.get("interpolation", "bicubic"))
        fill = config.get("fill_color", 0)
        if side is None or kind is None or interpolation is None or (kind == "letterbox" and fill != 0):
            raise UserError(f"this preprocessing of open_clip is not supported: {dict(config)}")
        mean, std = (
            tuple(config.get(key) or default) for key, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD))
        )
        return cls(side, side, mean, std, kind, interpolation, crop_rounds="even")  # type: ignore[arg-type]

    def __call__(self, images: Tensor, *, exact: bool = False) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to normalised pixels (B, 3, crop, crop), float32 (float64 stays).

        Args:
            exact: clamp and round to 8 bits in the resize where the library does. Leave it off where a gradient is
                wanted: both have none.
        """
        images = images if images.dtype == torch.float64 else images.float()
        pixels = self._resize(images, exact=exact and self.eight_bit)
        if self.mode == "crop":
            pixels = center_crop(pixels, self.crop, rounds=self.crop_rounds)
        elif self.mode == "letterbox":
            pixels = letterbox(pixels, self.crop)
        mean, std = _constants(self.mean, self.std, pixels.dtype, pixels.device)
        return (pixels - mean) / std

    def _resize(self, images: Tensor, *, exact: bool) -> Tensor:
        options: dict[str, Any] = {"mode": self.interpolation, "antialias": self.antialias}
        if self.mode == "squash":
            return resize(images, self.size, self.size, exact=exact, **options)
        if self.mode == "letterbox":
            scale = self.size / max(images.shape[-2:])
            height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
            return resize(images, height, width, exact=exact, **options)
        return resize_shortest(images, self.size, exact=exact, **options)


_CONSTANTS = (("image_mean", OPENAI_MEAN), ("image_std", OPENAI_STD))


@functools.lru_cache(maxsize=64)
def _constants(mean: Any, std: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """On the device once: a copy for each batch would make a GPU wait."""
    with torch.inference_mode(False):
        shift, scale = (torch.tensor(value, dtype=dtype, device=device).view(1, 3, 1, 1) for value in (mean, std))
    return shift, scale


def resize_shortest(images: Tensor, size: int, *, exact: bool = False, **options: Any) -> Tensor:
    """Resize (B, C, H, W) so that the shorter side is ``size``; the longer is rounded down. Options: of ``resize``."""
    height, width = images.shape[-2:]
    target = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    return resize(images, *target, exact=exact, **options)


def resize(
    images: Tensor,
    height: int,
    width: int,
    *,
    exact: bool = False,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Resize (B, C, H, W) to (B, C, height, width), antialiased.

    ``exact`` keeps values in [0, 1] at 8 bits throughout, as the libraries do on pictures.
    """
    if exact:
        return _resize_8_bits(images, height, width, mode=mode, antialias=antialias)
    return _interpolate(images, height, width, mode, antialias)


def _resize_8_bits(images: Tensor, height: int, width: int, *, mode: str, antialias: bool) -> Tensor:
    """Along rows, rounded, and then along columns.

    On the CPU by torch's own code for bytes, which torchvision uses as well and which takes less time; a GPU has none.
    """
    if antialias and _has_bytes(images.device):
        whole = torch.empty(images.shape, dtype=torch.uint8)
        for image, place in zip(images, whole, strict=True):  # one at a time stays in the processor's cache
            place.copy_(image.mul(255).round_().clamp_(0, 255))
        return _interpolate(whole, height, width, mode, antialias).to(images.dtype).div_(255)
    rows = _interpolate(_to_8_bits(images), images.shape[-2], width, mode, antialias)
    return _to_8_bits(_interpolate(_to_8_bits(rows), height, width, mode, antialias))


def _has_bytes(device: torch.device) -> bool:
    return device.type == "cpu"


def _interpolate(images: Tensor, height: int, width: int, mode: str, antialias: bool) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return interpolate(images, (height, width), mode=mode, antialias=antialias, align_corners=False)


def _to_8_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def center_crop(images: Tensor, side: int, *, rounds: Literal["down", "even"] = "down") -> Tensor:
    """The middle ``side`` x ``side`` of (B, C, H, W); half pixels at the top and left are rounded as said."""
    spare = [length - side for length in images.shape[-2:]]
    top, left = (s // 2 if rounds == "down" else round(s / 2) for s in spare)
    return images[..., top : top + side, left : left + side]


def letterbox(images: Tensor, side: int) -> Tensor:
    """Black around (B, C, H, W) to ``side`` x ``side``; of an odd number of lines the last goes below or right."""
    height, width = images.shape[-2:]
    top, left = (side - height) // 2, (side - width) // 2
    return pad(images, (left, side - width - left, top, side - height - top))
