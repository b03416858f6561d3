"""Which column holds what, and how a row becomes a pair.

Two layouts are known: ``prompt, chosen, rejected`` (the order is the preference; an optional ``label`` in [0, 1]
softens it), and two pictures with labels as in Pick-a-Pic: ``caption, jpg_0, jpg_1, label_0, label_1``. Captions of
the single pictures (``caption_0``, ``caption_1``, as in DCPO) fit either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffalign.data.images import EncodedImage
from diffalign.data.records import Pair
from diffalign.errors import UserError, did_you_mean

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "caption", "text"),
    "chosen": ("chosen", "chosen_image", "path1"),
    "rejected": ("rejected", "rejected_image", "path2"),
    "image_0": ("image_0", "jpg_0", "file_name_0"),
    "image_1": ("image_1", "jpg_1", "file_name_1"),
    "label": ("label",),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "has_label": ("has_label",),
    "chosen_prompt": ("chosen_prompt", "chosen_caption"),
    "rejected_prompt": ("rejected_prompt", "rejected_caption"),
    "prompt_0": ("prompt_0", "caption_0"),
    "prompt_1": ("prompt_1", "caption_1"),
    "margin": ("margin",),
    "user_id": ("user_id",),
    "id": ("id",),
}
"""Fields that a configuration can map (``columns: {prompt: my_caption}``), and the columns looked for otherwise."""

IMAGE_FIELDS = ("chosen", "rejected", "image_0", "image_1")


class BadRow(UserError):
    """A row that cannot be used. The message names it, says why, and what to do."""


class BadLabel(UserError):
    """A label that is no probability: a wrong column or scale, hence not a matter of one row."""


class Columns:
    """The columns of one source. ``names`` maps field to column, for the fields that are there.

    Args:
        found: the columns of the source.
        mapping: field to column, from the configuration; wins over the names looked for otherwise.
        source: name of the source, for errors.

    Raises:
        UserError: an unknown field, a mapped column that is not there, or no columns for a layout; the columns
            found are listed.
    """

    def __init__(self, found: Iterable[str], mapping: Mapping[str, str] | None = None, source: str = "data") -> None:
        found = list(found)
        listed = f"Columns found: {', '.join(found) or 'none'}."
        mapping = dict(mapping or {})
        for field, column in mapping.items():
            if field not in ALIASES:
                hint = did_you_mean(field, ALIASES)
                raise UserError(f"columns: unknown field {field!r}.{hint} Fields: {', '.join(ALIASES)}.")
            if column not in found:
                hint = did_you_mean(column, found)
                raise UserError(f"{source}: there is no column {column!r} (columns: {field}).{hint} {listed}")
        self.names = {
            field: mapping.get(field) or next(name for name in aliases if name in found)
            for field, aliases in ALIASES.items()
            if field in mapping or any(name in found for name in aliases)
        }
        labelled = {"image_0", "image_1"} <= mapping.keys() or not {"chosen", "rejected"} <= self.names.keys()
        self.labelled = labelled and bool({"image_0", "image_1"} & self.names.keys())
        """Whether the preference comes from labels; otherwise the order is the preference."""
        self._require(source, found, listed)

    def _require(self, source: str, found: list[str], listed: str) -> None:
        needed = ["image_0", "image_1"] if self.labelled else ["chosen", "rejected"]
        if not {"prompt", "prompt_0", "chosen_prompt"} & self.names.keys():
            needed.insert(0, "prompt")
        if self.labelled and not {"label", "label_0"} & self.names.keys():
            needed.append("label_0")
        missing = [field for field in needed if field not in self.names]
        if missing:
            hints = {did_you_mean(name, found) for field in missing for name in ALIASES[field]} - {""}
            example = f"columns: {{{missing[0]}: {(found or ['my_column'])[0]}}}"
            looked = "; ".join(f"{field} ({', '.join(ALIASES[field])})" for field in missing)
            raise UserError(
                f"{source}: no column for {looked}.{''.join(sorted(hints)[:1])} {listed} "
                f"Name it in the configuration, for example `{example}`."
            )

    @property
    def images(self) -> tuple[str, str]:
        """The columns of the two pictures, first and second."""
        first, second = ("image_0", "image_1") if self.labelled else ("chosen", "rejected")
        return self.names[first], self.names[second]

    @property
    def light(self) -> list[str]:
        """The columns beside the pictures."""
        return [name for field, name in self.names.items() if field not in IMAGE_FIELDS]

    @property
    def double_captions(self) -> bool:
        """Whether the single pictures have captions of their own."""
        return bool({"prompt_0", "prompt_1", "chosen_prompt", "rejected_prompt"} & self.names.keys())

    def preference(self, row: Mapping[str, Any], where: str) -> float | None:
        """The probability that the first picture is preferred, in [0, 1]; None where the row has no label.

        A row of Pick-a-Pic has no label where ``has_label`` is false or both labels are 0. In the other layout a row
        without a label is a plain preference.

        Raises:
            BadLabel: a label outside [0, 1].
            BadRow: two labels that do not add up to 1.
        """
        if not self.labelled:
            label = self._probability(row, "label", where)
            return 1.0 if label is None else label
        field = "label_0" if "label_0" in self.names else "label"
        first = self._probability(row, field, where)
        second = self._probability(row, "label_1", where) if field == "label_0" else None
        if self._get(row, "has_label") is False or first is None or (first == 0 and second == 0):
            return None
        if second is not None and abs(first + second - 1) > 1e-3:
            raise BadRow(f"{where}: label_0 {first:g} and label_1 {second:g} do not add up to 1. Correct the row.")
        return first

    def texts(self, row: Mapping[str, Any], where: str) -> tuple[str, str | None, str | None]:
        """(prompt, caption of the first picture, caption of the second); of a list the first entry.

        Raises:
            BadRow: no prompt. An empty one is allowed.
        """
        fields = ("prompt_0", "prompt_1") if self.labelled else ("chosen_prompt", "rejected_prompt")
        prompt, first, second = (self._text(row, field, where) for field in ("prompt", *fields))
        if prompt is None and "prompt" not in self.names:
            prompt = first
        if prompt is None:
            raise BadRow(f"{where}: the prompt is missing. Write one (an empty string is allowed), or remove the row.")
        return prompt, first, second

    def pair(self, row: Mapping[str, Any], index: int, where: str, root: Path | None) -> Pair:
        """The pair of a row that has a label; ``index`` is its number in the source.

        Raises:
            BadRow, BadLabel: see :meth:`texts` and :meth:`preference`.
            BadImage: a picture is missing. It is not opened here.
        """
        preference = self.preference(row, where)
        if preference is None:
            raise BadRow(f"{where}: the row has no label.")
        prompt, *captions = self.texts(row, where)
        images = [EncodedImage.wrap(row.get(name), f"{where}, column {name}", root) for name in self.images]
        margin = self._get(row, "margin")
        if preference < 0.5:
            captions.reverse()
            images.reverse()
            preference, margin = 1 - preference, None if margin is None else -margin
        user = self._get(row, "user_id")
        name = self._get(row, "id")
        return Pair(
            id=str(index) if name is None else str(name),
            prompt=prompt,
            chosen=images[0],
            rejected=images[1],
            chosen_prompt=captions[0],
            rejected_prompt=captions[1],
            label=preference,
            margin=None if margin is None else float(margin),
            user_id=None if user is None else str(user),
            where=where,
        )

    def _get(self, row: Mapping[str, Any], field: str) -> Any:
        return row.get(self.names[field]) if field in self.names else None

    def _probability(self, row: Mapping[str, Any], field: str, where: str) -> float | None:
        value = self._get(row, field)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise BadLabel(
                f"{where}: {self.names[field]} is {value!r}, outside [0, 1]. A label is the probability that the "
                "first picture is preferred (1, 0, 0.5 for a tie, or between): rescale it, or map another column."
            )
        return number

    def _text(self, row: Mapping[str, Any], field: str, where: str) -> str | None:
        value = self._get(row, field)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if value is not None and not isinstance(value, str):
            raise BadRow(f"{where}: {self.names[field]} is {value!r}, not text. Correct it, or map another column.")
        return value
