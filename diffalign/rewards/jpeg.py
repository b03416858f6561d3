"""How well JPEG compresses a picture (Black et al. 2023, "DDPO", arXiv 2305.13301, section 5.1): no model, quick to
move, and so the first reward to try an online method on."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Reward


class JpegIncompressibility(Reward):
    """Size of the picture as a JPEG file, in kB (1000 bytes): more for detail and noise.

    It grows with the number of pixels; compare pictures of one size. The last digits are of the JPEG library in use.

    Args:
        quality: of the encoder, 1 to 95.
        options: device, dtype, batch_size: see :class:`diffalign.rewards.base.Reward`; the work is done on the CPU.

    Raises:
        UserError: there is no such quality.
    """

    name = "jpeg_incompressibility"
    summary = "size of the picture as a JPEG file, in kB"
    uses_prompt = False
    takes = "pil"
    licence = "Apache-2.0"
    hacks = (
        "Noise is the maximum, whatever the prompt: it shows that an optimiser works, not that pictures improve.",
    )

    def __init__(self, quality: int = 95, **options: Any) -> None:
        super().__init__(**options)
        if not 1 <= quality <= 95:
            raise UserError(f"the quality of a JPEG is from 1 to 95, got {quality}")
        self.quality = quality

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        return torch.tensor([jpeg_bytes(image, self.quality) / 1000 for image in images])


class JpegCompressibility(JpegIncompressibility):
    """Minus the size of the picture as a JPEG file, in kB: more for plain areas, at most about -0.6."""

    name = "jpeg_compressibility"
    summary = "minus the size of the picture as a JPEG file, in kB"
    hacks = ("A plain colour is the maximum, whatever the prompt: it shows that an optimiser works, no more.",)

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        return -super().score(images, prompts, metadata)


def jpeg_bytes(image: Image.Image, quality: int = 95) -> int:
    """Length of an RGB picture as a JPEG file, in bytes, with Pillow's defaults otherwise."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
