"""From whatever a data set holds (bytes, files, PIL images, ``datasets`` dicts) to an RGB picture.

Conversions, all to 8-bit RGB: grayscale is repeated; transparency is composited on white; CMYK is converted without
its colour profile, as Pillow does; 16-bit samples are scaled by 255/65535, not clipped; the EXIF orientation is
applied; of an animation the first frame is taken.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from diffalign.errors import UserError

MIN_SIDE = 8
"""Pictures with a side below this many pixels are refused: less than one cell of a latent."""

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")

ImageData = bytes | bytearray | str | Path | Image.Image | Mapping[str, Any]


class BadImage(UserError):
    """A picture that cannot be used. The message names it, says why, and what to do."""


@dataclass(frozen=True)
class Inspection:
    """What is known of a picture without decoding it.

    ``digest`` is a hash of the content, 32 hex digits: equal pictures have equal digests wherever they are stored.
    ``size`` is (height, width) in pixels, after EXIF orientation.
    """

    digest: str
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture that is read and decoded only when asked.

    ``data`` are the bytes of an image file, the path of one, or a PIL image; ``where`` names it in errors.
    """

    data: bytes | Path | Image.Image = field(repr=False)
    where: str = "image"

    @classmethod
    def wrap(cls, value: Any, where: str, root: Path | None = None) -> EncodedImage:
        """Wrap one value of a data set. Relative paths are taken from ``root``.

        Raises:
            BadImage: the value is missing or of no type that can hold a picture.
        """
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, (bytes, bytearray)):
            return cls(bytes(value), where)
        if isinstance(value, Image.Image):
            return cls(value, where)
        if isinstance(value, (str, Path)) and str(value):
            path = Path(value)
            return cls(path if path.is_absolute() or root is None else root / path, where)
        raise BadImage(
            f"{where}: no picture there ({type(value).__name__}); expected image bytes, a file name or a PIL image. "
            "Fill it in, remove the row, or name the right column under `columns`."
        )

    def read(self) -> bytes:
        """The bytes of the image file; for a PIL image its size, orientation and raw samples.

        Raises:
            BadImage: the file is missing, unreadable or empty.
        """
        if isinstance(self.data, Image.Image):
            # A palette is not part of the samples.
            image = self.data.convert("RGBA") if self.data.mode in ("P", "PA") else self.data
            return f"{image.mode} {image.size} {_orientation(image)} ".encode() + image.tobytes()
        if isinstance(self.data, bytes):
            content = self.data
        else:
            try:
                content = self.data.read_bytes()
            except OSError as error:
                raise BadImage(
                    f"{self.where}: cannot read {self.data} ({error.strerror or error}). "
                    "File names are taken relative to the folder of the file that lists them."
                ) from error
        if not content:
            raise BadImage(f"{self.name} is empty (0 bytes). Replace the picture or remove the row.")
        return content

    @property
    def name(self) -> str:
        """How errors call the picture: the row, and the file if it is one."""
        return f"{self.where}: {self.data}" if isinstance(self.data, Path) else self.where

    def inspect(self) -> Inspection:
        """Look for damage without decoding, where that is possible.

        Reads the header and looks for the end marker of JPEG, PNG and WebP; where that is missing, and for
        other formats, decodes the picture. What stays undetected is damage in the middle of a complete file.

        Raises:
            BadImage: missing, unreadable, truncated, empty or too small.
        """
        content = self.read()
        image = self._open(content)
        if not isinstance(self.data, Image.Image) and not _is_complete(image.format, content):
            self.decode()
        try:
            size = _oriented_size(image, content)
        except _UNREADABLE as error:
            raise _unreadable(self.name, error) from error
        return Inspection(hashlib.blake2b(content, digest_size=16).hexdigest(), size)

    def decode(self) -> Image.Image:
        """The picture as 8-bit RGB, see the module's text for the conversions. Raises BadImage."""
        image = self._open(self.read())
        try:
            return _to_rgb(ImageOps.exif_transpose(image), self.name)
        except BadImage:
            raise
        except _UNREADABLE as error:
            raise _unreadable(self.name, error) from error

    def _open(self, content: bytes) -> Image.Image:
        try:
            image = self.data if isinstance(self.data, Image.Image) else Image.open(io.BytesIO(content))
        except _UNREADABLE as error:
            raise _unreadable(self.name, error) from error
        if min(image.size) < MIN_SIDE:
            raise BadImage(
                f"{self.name} is {image.width}x{image.height} pixels; the smallest usable side is {MIN_SIDE}. "
                "Replace the picture or remove the row."
            )
        return image


def decode_image(data: ImageData, where: str = "image") -> Image.Image:
    """Decode one picture to 8-bit RGB; ``where`` names it in errors.

    Raises:
        BadImage: missing, unreadable, truncated, empty, with a side under :data:`MIN_SIDE`, or of an ambiguous range.
    """
    return EncodedImage.wrap(data, where).decode()


def _unreadable(name: str, error: Exception) -> BadImage:
    reason = str(error).split("<_io.")[0].strip() or type(error).__name__
    return BadImage(f"{name} cannot be decoded: {reason}. Replace the picture or remove the row.")


def _is_complete(image_format: str | None, content: bytes) -> bool:
    if image_format == "JPEG":
        return b"\xff\xd9" in content[-1024:]
    if image_format == "PNG":
        return b"IEND" in content[-64:]
    if image_format == "WEBP":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    return False


def _oriented_size(image: Image.Image, content: bytes) -> tuple[int, int]:
    width, height = image.size
    # Pillow decodes a whole PNG to look for EXIF behind the pixels.
    if content.startswith(b"\x89PNG") and not any(marker in content for marker in _PNG_EXIF):
        return height, width
    return (width, height) if _orientation(image) in _QUARTER_TURNS else (height, width)


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(_EXIF_ORIENTATION, 1))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    if image.mode.startswith("I;16") or image.mode == "I":
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise BadImage(
                f"{name} has 32-bit samples from {samples.min()} to {samples.max()}, whose white is not known. "
                "Convert the picture to 8 or 16 bit."
            )
        return Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage(f"{name} has floating-point samples, whose white is not known. Convert it to 8 or 16 bit.")
    return image.convert("RGB")
