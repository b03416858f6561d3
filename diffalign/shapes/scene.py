"""The grammar of the shapes world: scenes, their captions, and a renderer to 64x64 RGB.

A *scene* is one or two flat shapes on a plain background. A *caption* states some of its facts; what a
caption leaves out is drawn from :data:`LEFT_OUT`, which is skewed on purpose, so that a model's diversity
can be measured against a known truth.

Captions are the language of the world: :meth:`Spec.caption` writes them, :func:`parse` reads them back.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Side of every picture, in pixels."""

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLORS = {
    "red": (215, 45, 45),
    "green": (45, 165, 70),
    "blue": (50, 85, 215),
    "yellow": (245, 210, 50),
    "purple": (150, 55, 180),
    "cyan": (60, 200, 215),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
    "brown": (115, 75, 45),
}
SIZES = {"small": (7.0, 8.5), "large": (11.5, 13.0)}
"""Radius of an object in pixels (half the side of its bounding box), drawn uniformly from the range."""

LEFT_OUT = {
    "color": {"red": 0.40, "blue": 0.20, "green": 0.15, "yellow": 0.10, "purple": 0.10, "cyan": 0.05},
    "size": {"large": 0.70, "small": 0.30},
    "background": {"white": 0.50, "gray": 0.25, "black": 0.15, "brown": 0.10},
}
"""How a fact that the caption leaves out is drawn. Skewed on purpose."""

STATED = {"color": 0.85, "size": 0.5, "background": 0.8, "relation": 0.8}
"""How often a caption of the training distribution states a fact."""

EVALUATION_SEED = 2026
"""Seed of the held-out captions that results are reported on; nothing is tuned on them, and nothing chosen by them."""
REPORTED = 1024
"""Results are reported on no more of them than this."""

_SUPERSAMPLING = 4
_HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Thing:
    """One object. ``color`` and ``size`` are None where a caption leaves them out."""

    shape: str
    color: str | None = None
    size: str | None = None

    def phrase(self) -> str:
        return " ".join(["a", *(word for word in (self.size, self.color, self.shape) if word)])


@dataclass(frozen=True)
class Spec:
    """What a caption says: one or two things (left one first), perhaps their order, perhaps the background.

    ``ordered`` is False where the caption does not say which of two things is on the left.
    ``reversed_order`` writes the right-hand thing first ("b right of a"), which says the same.
    """

    things: tuple[Thing, ...]
    background: str | None = None
    ordered: bool = True
    reversed_order: bool = False

    def caption(self) -> str:
        phrases = [thing.phrase() for thing in self.things]
        joint = "left of" if self.ordered else "and"
        if self.reversed_order:
            phrases.reverse()
            joint = "right of" if self.ordered else "and"
        text = f" {joint} ".join(phrases)
        return f"{text} on a {self.background} background" if self.background else text


@dataclass(frozen=True)
class Placed:
    """A thing with nothing left open: where it is drawn and how large, in pixels."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A complete scene, ready to be rendered. Things are ordered from left to right."""

    things: tuple[Placed, ...]
    background: str


_THING = r"an? (?:(?P<size{i}>small|large) )?(?:(?P<color{i}>%s) )?(?P<shape{i}>%s)" % (
    "|".join(COLORS),
    "|".join(SHAPES),
)
_CAPTION = re.compile(
    _THING.replace("{i}", "0")
    + r"(?: (?P<joint>left of|right of|and) "
    + _THING.replace("{i}", "1")
    + r")?(?: on an? (?P<background>%s) background)?" % "|".join(BACKGROUNDS)
)


def parse(caption: str) -> Spec:
    """Read a caption back. Raises ``ValueError`` naming the caption if it is not of this world's grammar."""
    match = _CAPTION.fullmatch(" ".join(caption.lower().replace(".", " ").split()))
    if match is None:
        raise ValueError(
            f"not a caption of the shapes world: {caption!r}. Expected, for example, "
            "'a small red circle left of a blue square on a gray background'."
        )
    part = match.groupdict()
    things = [Thing(part["shape0"], part["color0"], part["size0"])]
    if part["joint"]:
        things.append(Thing(part["shape1"], part["color1"], part["size1"]))
    if part["joint"] == "right of":
        things.reverse()
    return Spec(tuple(things), part["background"], part["joint"] != "and", part["joint"] == "right of")


def _draw(rng: np.random.Generator, weights: dict[str, float]) -> str:
    return str(rng.choice(list(weights), p=list(weights.values())))


def sample_spec(rng: np.random.Generator) -> Spec:
    """Draw a caption of the training distribution: uniform over what is stated, see :data:`STATED`."""

    def thing() -> Thing:
        return Thing(
            str(rng.choice(SHAPES)),
            str(rng.choice(list(COLORS))) if rng.random() < STATED["color"] else None,
            str(rng.choice(list(SIZES))) if rng.random() < STATED["size"] else None,
        )

    things = tuple(thing() for _ in range(int(rng.integers(1, 3))))
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < STATED["background"] else None
    if len(things) == 1:
        return Spec(things, background)
    return Spec(things, background, bool(rng.random() < STATED["relation"]), bool(rng.random() < 0.5))


def complete(spec: Spec, rng: np.random.Generator) -> Scene:
    """Fill in what the spec leaves out (from :data:`LEFT_OUT`) and place the things."""
    things = list(spec.things)
    if not spec.ordered and rng.random() < 0.5:
        things.reverse()
    placed = []
    for index, thing in enumerate(things):
        size = thing.size or _draw(rng, LEFT_OUT["size"])
        if len(things) == 1:
            x = SIZE / 2 + rng.uniform(-8, 8)
        else:
            x = SIZE * (1 + 2 * index) / 4 + rng.uniform(-1.5, 1.5)
        placed.append(
            Placed(
                shape=thing.shape,
                color=thing.color or _draw(rng, LEFT_OUT["color"]),
                size=size,
                x=float(x),
                y=float(SIZE / 2 + rng.uniform(-8, 8)),
                radius=float(rng.uniform(*SIZES[size])),
            )
        )
    return Scene(tuple(placed), spec.background or _draw(rng, LEFT_OUT["background"]))


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a polygonal shape that fills the box (x - r, y - r) to (x + r, y + r)."""
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    if shape == "cross":
        a = r / 3
        corner = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a)]
        return [(x + dx, y + dy) for dx, dy in [*corner, (-a, -a)]]
    if shape == "circle":
        angles = [2 * math.pi * k / 48 for k in range(48)]
        return [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an antialiased RGB picture of 64x64 pixels."""
    k = _SUPERSAMPLING
    canvas = Image.new("RGB", (SIZE * k, SIZE * k), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        pen.polygon(outline(thing.shape, thing.x * k, thing.y * k, thing.radius * k), fill=COLORS[thing.color])
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def meaning(caption: str) -> str:
    """One wording for all captions that say the same ("a left of b", "b right of a"; "a and b", "b and a")."""
    spec = replace(parse(caption), reversed_order=False)
    if not spec.ordered:
        spec = replace(spec, things=tuple(sorted(spec.things, key=Thing.phrase)))
    return spec.caption()


def is_heldout(caption: str) -> bool:
    """Whether a caption belongs to the held-out split: a tenth of all captions, by hash of their :func:`meaning`."""
    return int(hashlib.sha256(meaning(caption).encode()).hexdigest()[:8], 16) / 16**8 < _HELDOUT_SHARE


def sample_captions(count: int, seed: int, heldout: bool = False) -> list[str]:
    """``count`` different captions of one split, the same for the same seed."""
    return list(islice(_captions(seed, heldout), count))


def reported_captions(count: int, seed: int = EVALUATION_SEED) -> list[str]:
    """``count`` held-out captions to report results on; nothing is chosen by them."""
    return sample_captions(count, seed, heldout=True)


def validation_captions(count: int, seed: int) -> list[str]:
    """``count`` held-out captions to choose by (a checkpoint, when to stop): what they say, no reported one says.

    The reported ones hold nearly all that name a single thing, so these name two.
    """
    reported = {meaning(caption) for caption in reported_captions(REPORTED)}
    unreported = (caption for caption in _captions(seed, heldout=True) if meaning(caption) not in reported)
    return list(islice(unreported, count))


def _captions(seed: int, heldout: bool) -> Iterator[str]:
    rng = np.random.default_rng([seed, int(heldout)])
    seen: set[str] = set()
    while True:
        caption = sample_spec(rng).caption()
        if caption not in seen and is_heldout(caption) == heldout:
            seen.add(caption)
            yield caption
