"""Spoil pictures (noise, blur, JPEG, smears) and captions (one fact changed), to test and train what judges them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from diffalign.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Spec, Thing

Disturbance = Callable[[Image.Image, np.random.Generator], Image.Image]


def noise(image: Image.Image, rng: np.random.Generator, sigma: float = 8.0) -> Image.Image:
    """Add Gaussian noise of standard deviation ``sigma`` (of 255) to every channel."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    return Image.fromarray((pixels + rng.normal(0, sigma, pixels.shape)).round().clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, rng: np.random.Generator, radius: float | None = None) -> Image.Image:
    """Gaussian blur; the standard deviation in pixels is drawn from 0.7 to 1.0 unless given."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.7, 1.0) if radius is None else radius))


def jpeg(image: Image.Image, rng: np.random.Generator, quality: int = 75) -> Image.Image:
    """Write as JPEG with halved chroma and read back."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def everything(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blur, then noise, then JPEG."""
    return jpeg(noise(blur(image, rng), rng), rng)


DISTURBANCES: dict[str, Disturbance] = {
    "none": lambda image, rng: image,
    "noise": noise,
    "blur": blur,
    "jpeg": jpeg,
    "all three": everything,
}


def changeable_facts(spec: Spec) -> list[str]:
    """Names of the facts that ``spec`` states, as in :func:`diffalign.shapes.checker.facts`."""
    names = ["count"]
    for index, thing in enumerate(spec.things):
        names.append(f"thing{index}.shape")
        names += [f"thing{index}.{key}" for key in ("color", "size") if getattr(thing, key) is not None]
    if len(spec.things) == 2 and spec.ordered:
        names.append("relation")
    if spec.background is not None:
        names.append("background")
    return names


def change_fact(spec: Spec, rng: np.random.Generator, fact: str | None = None) -> Spec:
    """``spec`` with one stated fact changed (drawn uniformly unless named).

    ``count`` drops one of two things or adds a second one. The result may still be true of a scene by chance,
    where things look alike: hold it against ``Reading.of_scene`` if that matters.
    """
    fact = fact or str(rng.choice(changeable_facts(spec)))
    if fact == "count":
        if len(spec.things) == 2:
            return replace(spec, things=(spec.things[int(rng.integers(2))],), ordered=True, reversed_order=False)
        return replace(spec, things=(*spec.things, Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))))))
    if fact == "relation":
        return replace(spec, things=spec.things[::-1])
    if fact == "background":
        return replace(spec, background=_other(spec.background, list(BACKGROUNDS), rng))
    thing, key = fact.split(".")
    index = int(thing.removeprefix("thing"))
    known = {"shape": list(SHAPES), "color": list(COLORS), "size": list(SIZES)}[key]
    things = list(spec.things)
    things[index] = replace(things[index], **{key: _other(getattr(things[index], key), known, rng)})
    return replace(spec, things=tuple(things))


def _other(value: str | None, known: list[str], rng: np.random.Generator) -> str:
    return str(rng.choice([name for name in known if name != value]))
