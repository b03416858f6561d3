"""The one record that every reader produces."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.data.images import EncodedImage


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
