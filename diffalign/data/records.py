"""The records that every reader produces: a preference pair, or one picture that is liked or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from diffalign.data.images import EncodedImage


class Record(Protocol):
    """What caching and training ask of a record, whether it holds one picture or two."""

    SIDES: ClassVar[tuple[str, ...]]
    """Names of the attributes that hold the pictures."""

    @property
    def id(self) -> str:
        """Keys every random number that belongs to the record."""

    @property
    def captions(self) -> tuple[str, *tuple[str | None, ...]]:
        """The prompt; where pictures can have captions of their own, those too, None where there is none."""

    @property
    def numbers(self) -> Mapping[str, float | None]:
        """What a loss may want beside pictures and text: "label" and others."""


@dataclass(frozen=True)
class Pair:
    """One preference: two pictures for one prompt, the preferred one first.

    ``label`` is the probability that ``chosen`` is preferred. Readers put the preferred picture first, so it lies in
    [0.5, 1]: 1 for a plain preference, 0.5 for a tie that was kept, anything between for a soft one.
    ``chosen_prompt`` and ``rejected_prompt`` are captions of the single pictures where a set has them (DCPO); None
    otherwise. ``margin`` is by how much the chosen picture won, in whatever unit the set uses, and is negated where a
    reader swaps the pictures.
    ``id`` keys every random number that belongs to the pair. It is the ``id`` column where there is one and the
    row number in the source otherwise, so that dropping ties does not shift it. Pairs with equal ids share their
    noise. ``where`` names file and row for error messages.
    """

    SIDES: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    id: str
    prompt: str
    chosen: EncodedImage
    rejected: EncodedImage
    chosen_prompt: str | None = None
    rejected_prompt: str | None = None
    label: float = 1.0
    margin: float | None = None
    user_id: str | None = None
    where: str = ""

    @property
    def captions(self) -> tuple[str, str | None, str | None]:
        return self.prompt, self.chosen_prompt, self.rejected_prompt

    @property
    def numbers(self) -> Mapping[str, float | None]:
        return {"label": self.label, "margin": self.margin}


@dataclass(frozen=True)
class LabelledImage:
    """One picture with its prompt, and whether it is liked.

    ``label`` is the probability that the picture is liked, in [0, 1]: 1 liked, 0 disliked; None where nobody said.
    ``weight`` multiplies its loss (0 or more). ``id`` and ``where`` are as in :class:`Pair`.
    """

    SIDES: ClassVar[tuple[str, ...]] = ("image",)

    id: str
    prompt: str
    image: EncodedImage
    label: float | None = None
    weight: float = 1.0
    where: str = ""

    @property
    def captions(self) -> tuple[str]:
        return (self.prompt,)

    @property
    def numbers(self) -> Mapping[str, float | None]:
        return {"label": self.label, "weight": self.weight}
