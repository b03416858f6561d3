"""Read a picture of the shapes world back, without a network, and judge it against a caption.

The background is the median colour of the border. What differs from it is cut into connected components; a
component's colour is the median over its core, its shape the template with the highest overlap. Templates are
fitted by area and centroid, not by bounding box: blur takes the tips off a diamond but keeps its area. Where no sharp
template fits well, blurred ones are tried: JPEG blurs colour, and some objects differ from the background in colour
only. For the same reason edges are sought with more weight on brightness.

``python -m diffalign.shapes.checker`` measures how often it is right on disturbed pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from diffalign.errors import UserError
from diffalign.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZE, SIZES, Scene, Spec, Thing, outline, parse

Picture = Image.Image | NDArray[np.uint8]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

FOREGROUND_DISTANCE = 45.0
"""RGB distance (0 to 441) from the background above which a pixel belongs to an object."""
COLOR_DISTANCE = 60.0
"""RGB distance within which an object has a colour of the palette; palette colours are 106 or more apart."""
BACKGROUND_DISTANCE = 45.0
"""RGB distance within which the border is a background of the palette; those are 99 or more apart."""
MINIMUM_AREA = 30
"""Pixels below which a component is a blemish, not an object. The smallest object of the world has 98."""
MINIMUM_OVERLAP = 0.8
"""Overlap (intersection over union) with the best template below which a component has no shape."""
LARGE_FROM = (SIZES["small"][1] + SIZES["large"][0]) / 2
"""Radius in pixels from which an object is large."""

_UNIT_AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "diamond": 2.0, "cross": 20 / 9}
_CENTROID_BELOW_CENTER = {"triangle": 1 / 3}
_REACH = 1.6
_TABLE = 256
_SUBPIXELS = np.array([-0.25, 0.25], np.float32)
_SUPERSAMPLING = 4
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_SEEN = np.eye(3, dtype=np.float32) + 12 * np.outer(_LUMA, _LUMA)
_SHARP_OVERLAP = 0.9
_BLURS = (1.0, 1.6)


@dataclass(frozen=True)
class Found:
    """One object of a picture. Facts that fit nothing in the world are None.

    ``x``, ``y`` (centre) and ``radius`` (half the box) are in pixels; ``rgb`` is the measured colour, 0 to 255;
    ``overlap`` is the overlap with the best template, 0 to 1.
    """

    shape: str | None
    color: str | None
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: its objects from left to right, and its background (None if of no known colour)."""

    things: tuple[Found, ...]
    background: str | None
    background_rgb: tuple[float, float, float]

    @classmethod
    def of_scene(cls, scene: Scene) -> Reading:
        """The reading a perfect reader would give of ``scene``: the truth to hold captions against."""
        things = tuple(
            Found(t.shape, t.color, t.size, t.x, t.y, t.radius, _rgb(np.array(COLORS[t.color])), 1.0)
            for t in scene.things
        )
        return cls(things, scene.background, _rgb(np.array(BACKGROUNDS[scene.background])))


def as_pixels(image: Picture) -> NDArray[np.uint8]:
    """Any RGB picture as a uint8 array (64, 64, 3); other sizes are resized. Raises ``UserError`` otherwise."""
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
        return np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(
            f"the checker reads PIL images or uint8 arrays (height, width, 3), not {image.dtype} of shape "
            f"{image.shape}. Convert floats in [0, 1] with (255 * x).round().astype('uint8')."
        )
    return image if image.shape[:2] == (SIZE, SIZE) else as_pixels(Image.fromarray(image))


def read(image: Picture) -> Reading:
    """Read one picture: PIL image or uint8 array (height, width, 3), resized to 64x64 where needed."""
    pixels = as_pixels(image).astype(np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[2:-2, :2].reshape(-1, 3)])
    border = np.concatenate([border, pixels[2:-2, -2:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    difference = pixels - ground
    foreground = (difference**2).sum(-1) > FOREGROUND_DISTANCE**2
    components = [part for mask in _components(foreground) for part in _split(mask, pixels, ground)]
    things = sorted((_describe_component(mask, pixels, ground) for mask in components), key=lambda found: found.x)
    return Reading(tuple(things), _nearest(ground, BACKGROUNDS, BACKGROUND_DISTANCE), _rgb(ground))


def read_all(images: NDArray[np.uint8] | Sequence[Picture]) -> list[Reading]:
    """Read a batch: uint8 array (N, height, width, 3) or a sequence of pictures."""
    return [read(image) for image in images]


def facts(reading: Reading, spec: Spec) -> dict[str, bool]:
    """Which facts of ``spec`` hold in ``reading``.

    Keys: ``count``; ``thing0.shape`` and, where stated, ``thing0.color``, ``thing0.size`` (likewise ``thing1``);
    ``relation`` for two things in a stated order; ``background`` where stated. Things are matched to objects so that
    most facts hold, their own facts before the relation: of two things that swapped places only the relation is
    wrong. Where the count is wrong, the best match among what is there is judged.
    """
    slots: list[Found | None] = [*reading.things, *([None] * max(0, len(spec.things) - len(reading.things)))]
    best: tuple[tuple[int, int], dict[str, bool]] | None = None
    for chosen in permutations(slots, len(spec.things)):
        held = {
            f"thing{index}.{name}": holds
            for index, (thing, found) in enumerate(zip(spec.things, chosen, strict=True))
            for name, holds in _thing_facts(thing, found).items()
        }
        own = sum(held.values())
        if len(spec.things) == 2 and spec.ordered:
            left, right = chosen
            held["relation"] = left is not None and right is not None and left.x < right.x
        if best is None or (sum(held.values()), own) > best[0]:
            best = (sum(held.values()), own), held
    assert best is not None
    result = {"count": len(reading.things) == len(spec.things), **best[1]}
    if spec.background is not None:
        result["background"] = reading.background == spec.background
    return result


def score(image: Picture, caption: str) -> float:
    """Share of the caption's facts that hold in the picture, in [0, 1]. ``ValueError`` on an unknown caption."""
    return faithfulness(read(image), caption)


def scores(images: NDArray[np.uint8] | Sequence[Picture], captions: Sequence[str]) -> NDArray[np.float64]:
    """:func:`score` of each of N pictures against its own caption, shape (N,)."""
    if len(images) != len(captions):
        raise UserError(f"{len(images)} pictures but {len(captions)} captions: give one caption for each picture.")
    return np.array([score(image, caption) for image, caption in zip(images, captions, strict=True)])


def faithfulness(reading: Reading, caption: str) -> float:
    """:func:`score` of a picture that was read before."""
    held = facts(reading, parse(caption))
    return sum(held.values()) / len(held)


def describe(reading: Reading) -> str | None:
    """A caption for the reading that states all that was recognised; None where no caption can say what is there."""
    if not 1 <= len(reading.things) <= 2 or any(found.shape is None for found in reading.things):
        return None
    things = tuple(Thing(str(found.shape), found.color, found.size) for found in reading.things)
    return Spec(things, reading.background).caption()


def residual(image: Picture, reading: Reading | None = None) -> float:
    """How far the picture is from what it was read as: mean absolute difference to the reading drawn again, in [0, 1].

    0.002 to 0.005 for a clean picture (position is estimated); grows with noise, blur, smears, blemishes and off
    colours. A component without a shape is not drawn again, so all of it counts.
    """
    pixels = as_pixels(image)
    drawn = redraw(read(pixels) if reading is None else reading)
    return float(np.abs(pixels.astype(np.float32) - drawn).mean() / 255)


def redraw(reading: Reading) -> NDArray[np.uint8]:
    """Draw a reading as a clean picture, uint8 (64, 64, 3): palette colours where known, else those measured."""
    k = _SUPERSAMPLING
    ground = BACKGROUNDS[reading.background] if reading.background else _whole(reading.background_rgb)
    canvas = Image.new("RGB", (SIZE * k, SIZE * k), ground)
    pen = ImageDraw.Draw(canvas)
    for found in reading.things:
        if found.shape is not None:
            fill = COLORS[found.color] if found.color else _whole(found.rgb)
            pen.polygon(outline(found.shape, found.x * k, found.y * k, found.radius * k), fill=fill)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def _rgb(values: NDArray[np.floating] | NDArray[np.integer]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def _whole(rgb: tuple[float, float, float]) -> tuple[int, int, int]:
    return round(rgb[0]), round(rgb[1]), round(rgb[2])


def _thing_facts(thing: Thing, found: Found | None) -> dict[str, bool]:
    held = {"shape": found is not None and found.shape == thing.shape}
    if thing.color is not None:
        held["color"] = found is not None and found.color == thing.color
    if thing.size is not None:
        held["size"] = found is not None and found.size == thing.size
    return held


def _nearest(rgb: Floats, palette: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    names = list(palette)
    distances = np.linalg.norm(np.array([palette[name] for name in names], np.float32) - rgb, axis=1)
    best = int(distances.argmin())
    return names[best] if distances[best] <= limit else None


def _components(mask: Mask) -> list[Mask]:
    labels, count = ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == index for index in range(1, count + 1) if areas[index] >= MINIMUM_AREA]


def _core_color(mask: Mask, pixels: Floats) -> Floats:
    core = ndimage.binary_erosion(mask)
    return np.median(pixels[core if core.sum() >= 8 else mask], axis=0)


def _split(mask: Mask, pixels: Floats, ground: Floats) -> list[Mask]:
    """Cut a component where it is less than half as far from the background as its core: blur makes bridges."""
    contrast = np.linalg.norm(_core_color(mask, pixels) - ground)
    parts = _components(mask & (((pixels - ground) ** 2).sum(-1) > (contrast / 2) ** 2))
    return parts if len(parts) > 1 else [mask]


def _describe_component(mask: Mask, pixels: Floats, ground: Floats) -> Found:
    rgb = _core_color(mask, pixels)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (
        slice(max(0, rows[0] - 3), min(SIZE, rows[-1] + 4)),
        slice(max(0, columns[0] - 3), min(SIZE, columns[-1] + 4)),
    )
    direction = _SEEN @ (rgb - ground)
    coverage = np.clip((pixels[box] - ground) @ direction / max(float(direction @ (rgb - ground)), 1.0), 0, 1)
    coverage *= ndimage.binary_dilation(mask[box])
    if not coverage.any():  # Lighter and darker than the ground, and the ground's colour in the middle: noise.
        coverage = mask[box].astype(np.float32)
    ys = np.arange(box[0].start, box[0].stop, dtype=np.float32) + np.float32(0.5)
    xs = np.arange(box[1].start, box[1].stop, dtype=np.float32) + np.float32(0.5)
    area = float(coverage.sum())
    x, y = float(coverage.sum(0) @ xs) / area, float(coverage.sum(1) @ ys) / area
    shape, overlap, y, radius = _best_shape(coverage, xs, ys, x, y, area)
    return Found(
        shape=shape if overlap >= MINIMUM_OVERLAP else None,
        color=_nearest(rgb, COLORS, COLOR_DISTANCE),
        size="large" if radius >= LARGE_FROM else "small",
        x=x,
        y=y,
        radius=radius,
        rgb=_rgb(rgb),
        overlap=overlap,
    )


def _best_shape(
    coverage: Floats, xs: Floats, ys: Floats, x: float, y: float, area: float
) -> tuple[str, float, float, float]:
    """The shape with the highest overlap, the overlap, its centre's y and its radius in pixels."""
    best = ("", -1.0, y, 0.0)
    columns, rows = (xs[:, None] + _SUBPIXELS).ravel(), (ys[:, None] + _SUBPIXELS).ravel()
    templates = []
    for shape in SHAPES:
        radius = float(np.sqrt(area / _UNIT_AREA[shape]))
        center = y - _CENTROID_BELOW_CENTER.get(shape, 0.0) * radius
        fine = _template(shape)[np.ix_(_table_index((rows - center) / radius), _table_index((columns - x) / radius))]
        template = fine.reshape(len(ys), 2, len(xs), 2).mean((1, 3))
        templates.append((shape, center, radius, template))
        best = max(best, (shape, _overlap(coverage, template), center, radius), key=lambda candidate: candidate[1])
    for sigma in _BLURS if best[1] < _SHARP_OVERLAP else ():
        for shape, center, radius, template in templates:
            overlap = _overlap(coverage, ndimage.gaussian_filter(template, sigma, truncate=2.5))
            best = max(best, (shape, overlap, center, radius), key=lambda candidate: candidate[1])
    return best


def _overlap(coverage: Floats, template: Floats) -> float:
    return float(np.minimum(coverage, template).sum() / np.maximum(coverage, template).sum())


def _table_index(position: Floats) -> NDArray[np.intp]:
    index = ((position / _REACH + 1) / 2 * _TABLE).astype(np.intp)
    return np.clip(index, 0, _TABLE - 1)


@cache
def _template(shape: str) -> Floats:
    """The shape of radius 1 over the square from -1.6 to 1.6, as 0 and 1."""
    canvas = Image.new("L", (_TABLE, _TABLE), 0)
    middle = _TABLE / 2
    ImageDraw.Draw(canvas).polygon(outline(shape, middle, middle, middle / _REACH), fill=1)
    return np.asarray(canvas).astype(np.float32)


if __name__ == "__main__":
    from diffalign.shapes.accuracy import main

    main()
