"""Simulated annotators: who prefers which picture of the shapes world, and why.

The utility of a picture for an annotator is

    8 x faithfulness + 3 x cleanliness + taste

with faithfulness the checker's share of caption facts that hold, cleanliness 1 for a picture without artefacts and 0
from a residual of 0.05 on, and taste a weighted sum of features in [0, 1]:

| user | large | centred | high up | light background | decisiveness |
|---|---|---|---|---|---|
| 1 | 1.5 | 1.5 | | | 1.5 |
| 2 | 1.5 | 1.0 | | | 1.0 |
| 3 | 1.0 | 1.0 | | | 1.0 |
| 4 | 0.5 | 0.5 | | | 0.5 |
| 5 | 0.5 | | 3.0 | 2.0 | 1.0 |
| 6 | 0.5 | | -3.0 | -2.0 | 1.0 |

- *large*: mean radius of the things from 7 pixels (0) to 13 (1); only things whose size the caption leaves open.
- *centred*: how near the middle of the things is to the middle of the picture (1), 0 from 10 pixels away.
- *high up*: the middle of the things, from 10 pixels below the middle of the picture (0) to 10 above it (1).
- *light background*: its brightness, 0 to 1; only where the caption leaves the background open.

So users 1 to 4 share a taste to different degrees, users 5 and 6 are of opposite taste, and no taste asks for a
picture that contradicts its caption. A choice between two pictures is Bradley-Terry: with logistic noise divided by
the user's decisiveness, and a tie where the noisy difference stays below :data:`TIE_THRESHOLD`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from diffalign.errors import UserError
from diffalign.shapes.checker import Picture, Reading, as_pixels, facts, read, residual
from diffalign.shapes.scene import BACKGROUNDS, SIZE, SIZES, Spec, parse

FAITHFULNESS_WEIGHT = 8.0
CLEANLINESS_WEIGHT = 3.0
DIRTY_RESIDUAL = 0.05
"""Mean absolute difference (of 1) to the redrawn reading from which a picture counts as not clean at all."""
OFF_CENTER = 10.0
"""Pixels from the middle at which a picture counts as not centred at all."""
TIE_THRESHOLD = 0.33
"""Utility difference below which, noise included, an annotator sees no difference."""


@dataclass(frozen=True)
class Annotator:
    """Weights of one user's taste, and how decisive they are (1 / scale of the logistic noise)."""

    large: float = 0.0
    centred: float = 0.0
    high: float = 0.0
    light: float = 0.0
    decisiveness: float = 1.0

    def taste(self, view: View, spec: Spec) -> float:
        """Utility of what the caption leaves open."""
        return (
            self.large * view.large(spec)
            + self.centred * view.centred
            + self.high * view.high
            + self.light * view.light(spec)
        )


ANNOTATORS: Mapping[int, Annotator] = MappingProxyType(
    {
        1: Annotator(large=1.5, centred=1.5, decisiveness=1.5),
        2: Annotator(large=1.5, centred=1.0),
        3: Annotator(large=1.0, centred=1.0),
        4: Annotator(large=0.5, centred=0.5, decisiveness=0.5),
        5: Annotator(large=0.5, high=3.0, light=2.0),
        6: Annotator(large=0.5, high=-3.0, light=-2.0),
    }
)
"""The simulated users by ``user_id``; the table above."""

OPPOSITES = (5, 6)
"""The two users of opposite taste."""


@dataclass(frozen=True)
class View:
    """What annotators look at in a picture: its reading and its cleanliness, in [0, 1]."""

    reading: Reading
    cleanliness: float

    @classmethod
    def of(cls, image: Picture) -> View:
        """Look at a picture: PIL image or uint8 array (height, width, 3)."""
        pixels = as_pixels(image)
        reading = read(pixels)
        return cls(reading, max(0.0, 1 - residual(pixels, reading) / DIRTY_RESIDUAL))

    def faithfulness(self, spec: Spec) -> float:
        """Share of the facts of ``spec`` that hold, in [0, 1]."""
        held = facts(self.reading, spec)
        return sum(held.values()) / len(held)

    def large(self, spec: Spec | None = None) -> float:
        """How large the things are, in [0, 1]; 0 for an empty picture or where ``spec`` states every size.

        Where only some sizes are open, all things count, by the share of the open ones.
        """
        if not self.reading.things:
            return 0.0
        openness = 1.0 if spec is None else sum(thing.size is None for thing in spec.things) / len(spec.things)
        low, high = SIZES["small"][0], SIZES["large"][1]
        radius = np.mean([found.radius for found in self.reading.things])
        return openness * float(np.clip((radius - low) / (high - low), 0, 1))

    @property
    def centred(self) -> float:
        """How near the middle of the things is to the middle of the picture, in [0, 1]; 0 for an empty picture."""
        if not self.reading.things:
            return 0.0
        x, y = self._middle()
        return float(np.clip(1 - np.hypot(x, y) / OFF_CENTER, 0, 1))

    @property
    def high(self) -> float:
        """How high up the things are, in [0, 1]; 0.5 in the middle and for an empty picture."""
        y = self._middle()[1] if self.reading.things else 0.0
        return float(np.clip(0.5 - y / (2 * OFF_CENTER), 0, 1))

    def light(self, spec: Spec) -> float:
        """Brightness of the background, in [0, 1]; 0 where ``spec`` states it."""
        if spec.background is not None:
            return 0.0
        rgb = self.reading.background_rgb
        darkest, lightest = np.mean(BACKGROUNDS["black"]), np.mean(BACKGROUNDS["white"])
        return float(np.clip((np.mean(rgb) - darkest) / (lightest - darkest), 0, 1))

    def _middle(self) -> tuple[float, float]:
        """Middle of the things, in pixels right of and below the middle of the picture."""
        x, y = np.mean([(found.x, found.y) for found in self.reading.things], axis=0) - SIZE / 2
        return float(x), float(y)


def annotator(user_id: int) -> Annotator:
    """The annotator of a ``user_id``. Raises ``UserError`` for one that does not exist."""
    if user_id not in ANNOTATORS:
        raise UserError(f"no annotator has user_id {user_id!r}; there are {', '.join(map(str, ANNOTATORS))}.")
    return ANNOTATORS[user_id]


def utility(image: Picture | View, caption: str, user_id: int | None = None) -> float:
    """Noise-free utility of a picture under a caption, about 0 to 15.

    Without ``user_id``: the mean over all annotators (the two opposite tastes cancel). Raises ``ValueError`` for a
    caption outside the grammar and ``UserError`` for an unknown user.
    """
    view = image if isinstance(image, View) else View.of(image)
    spec = parse(caption)
    users = list(ANNOTATORS.values()) if user_id is None else [annotator(user_id)]
    taste = float(np.mean([user.taste(view, spec) for user in users]))
    return FAITHFULNESS_WEIGHT * view.faithfulness(spec) + CLEANLINESS_WEIGHT * view.cleanliness + taste


def prefer(
    image_0: Picture | View, image_1: Picture | View, caption: str, user_id: int, rng: np.random.Generator
) -> float:
    """The user's label for the first picture: 1.0 if it is preferred, 0.0 if the second is, 0.5 for a tie.

    Draws one number from ``rng``, so that the same generator state gives the same choice.
    """
    difference = utility(image_0, caption, user_id) - utility(image_1, caption, user_id)
    difference += rng.logistic(0.0, 1 / annotator(user_id).decisiveness)
    if abs(difference) < TIE_THRESHOLD:
        return 0.5
    return 1.0 if difference > 0 else 0.0


def rating(image: Picture | View) -> float:
    """How pleasing a picture is whatever its caption, from 1 to 10: half cleanliness, half the common taste.

    ``1 + 9 (0.5 cleanliness + 0.25 large + 0.25 centred)``; the target of ``shapes-aesthetic``.
    """
    view = image if isinstance(image, View) else View.of(image)
    return 1 + 9 * (0.5 * view.cleanliness + 0.25 * view.large() + 0.25 * view.centred)
