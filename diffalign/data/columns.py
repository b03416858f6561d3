"""Which column holds what, and how a row becomes a pair.

Two layouts are known: ``prompt, chosen, rejected`` (the order is the preference; an optional ``label`` in [0, 1]
softens it), and two pictures with labels as in Pick-a-Pic: ``caption, jpg_0, jpg_1, label_0, label_1``. Captions of
the single pictures (``caption_0``, ``caption_1``, as in DCPO) fit either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffalign.data.fields import BadLabel, BadRow, Fields
from diffalign.data.images import EncodedImage
from diffalign.data.records import Pair

IMAGE_FIELDS = ("chosen", "rejected", "image_0", "image_1")

__all__ = ["BadLabel", "BadRow", "Columns"]


class Columns(Fields):
    """The columns of a source of pairs.

    Args:
        found, mapping, source: see :class:`Fields`.

    Raises:
        UserError: see :class:`Fields`; or no columns for a layout.
    """

    ALIASES: ClassVar[Mapping[str, Sequence[str]]] = {
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
    LABEL_MEANS = "A label is the probability that the first picture is preferred (1, 0, 0.5 for a tie, or between)"

    def __init__(self, found: Iterable[str], mapping: Mapping[str, str] | None = None, source: str = "data") -> None:
        super().__init__(found, mapping, source)
        labelled = {"image_0", "image_1"} <= (mapping or {}).keys() or not {"chosen", "rejected"} <= self.names.keys()
        self.labelled = labelled and bool({"image_0", "image_1"} & self.names.keys())
        """Whether the preference comes from labels; otherwise the order is the preference."""
        needed = ["image_0", "image_1"] if self.labelled else ["chosen", "rejected"]
        if not {"prompt", "prompt_0", "chosen_prompt"} & self.names.keys():
            needed.insert(0, "prompt")
        if self.labelled and not {"label", "label_0"} & self.names.keys():
            needed.append("label_0")
        self._require(needed)

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
        if self.value(row, "has_label") is False or first is None or (first == 0 and second == 0):
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
        margin = self.value(row, "margin")
        if preference < 0.5:
            captions.reverse()
            images.reverse()
            preference, margin = 1 - preference, None if margin is None else -margin
        user = self.value(row, "user_id")
        name = self.value(row, "id")
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
