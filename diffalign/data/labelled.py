"""Single images with a prompt, and whether each is liked: for fine-tuning and for learning without pairs.

Read are sets of images with captions (and labels), rows of Diffusion-KTO (``split`` exclusive_win, exclusive_lose or
intersections), and every source of pairs, whose chosen images are liked and whose rejected ones are not.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffalign.data.columns import Columns
from diffalign.data.fields import BadRow, Fields
from diffalign.data.images import EncodedImage
from diffalign.data.layouts import open_table
from diffalign.data.ranked import expand_rankings
from diffalign.data.readers import PairSource, PairStream, pairs_of
from diffalign.data.records import LabelledImage, Pair
from diffalign.data.sources import Source, Stream
from diffalign.data.tables import StreamTable
from diffalign.errors import UserError

if TYPE_CHECKING:
    from diffalign.data.plans import Plan

logger = logging.getLogger(__name__)

Both = Literal["liked", "disliked", "drop"]

_SPLITS = {"exclusive_win": 1.0, "exclusive_lose": 0.0, "exclusive_loss": 0.0, "intersections": None}
"""Values of Diffusion-KTO's column ``split``; None: liked in some comparisons, disliked in others."""

_BOTH = "images both liked and disliked"


class ImageColumns(Fields):
    """The columns of a source of single images; arguments and errors as for :class:`Fields`."""

    ALIASES: ClassVar[Mapping[str, Sequence[str]]] = {
        "prompt": ("prompt", "caption", "text"),
        "image": ("image", "jpg", "jpeg", "png", "webp", "file_name", "image_path", "file_path", "path"),
        "label": ("label", "liked"),
        "split": ("split",),
        "weight": ("weight",),
        "id": ("id", "image_uid", "__key__"),
    }
    LABEL_MEANS = "A label says whether the picture is liked (1 or true) or disliked (0 or false)"

    def __init__(self, found: Iterable[str], mapping: Mapping[str, str] | None = None, source: str = "data") -> None:
        super().__init__(found, mapping, source)
        self._require(["image", "prompt"])

    def label(self, row: Mapping[str, Any], where: str) -> float | None | Literal["both"]:
        """The probability that the picture is liked; None without a label, "both" for an intersection.

        Raises:
            BadLabel: a label outside [0, 1].
        """
        label = self._probability(row, "label", where)
        if label is not None:
            return label
        split = self.value(row, "split")
        if split not in _SPLITS:
            return None
        value = _SPLITS[split]
        return "both" if value is None else value

    def prompt(self, row: Mapping[str, Any], where: str) -> str:
        """The prompt. Raises BadRow where it is missing; an empty one is allowed."""
        prompt = self._text(row, "prompt", where)
        if prompt is None:
            raise BadRow(f"{where}: the prompt is missing. Write one (an empty string is allowed), or remove the row.")
        return prompt

    def weight(self, row: Mapping[str, Any], where: str) -> float:
        """The weight, 1 without one. Raises BadRow where it is negative or no number."""
        value = self.value(row, "weight")
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise BadRow(f"{where}: {self.names['weight']} is {value!r}; a weight is a number, 0 or more. Correct it.")
        return float(value)


@dataclass(frozen=True)
class ImageReading:
    """Rows of a table as single images; see :class:`diffalign.data.sources.Reading`.

    ``columns`` is None for the images of pairs.
    """

    noun: ClassVar[str] = "images"
    remedy: ClassVar[str] = "give other data, or label the images (a column label: 1 liked, 0 disliked)"

    columns: ImageColumns | None
    keep: Literal["all", "labelled", "liked"]
    """Which images are kept: all, those with a label, or those that are not disliked."""
    merge: bool
    """Whether images of equal content and prompt are one."""
    both: Both
    """What an image is that is liked in one row and disliked in another."""

    @property
    def _columns(self) -> ImageColumns:
        assert self.columns is not None
        return self.columns

    @property
    def light(self) -> list[str]:
        return [name for field, name in self._columns.names.items() if field != "image"]

    @property
    def images(self) -> list[str]:
        return [self._columns.names["image"]]

    @property
    def identity(self) -> str:
        return repr((sorted(self._columns.names.items()), self.keep, self.merge, self.both))

    def judge(self, row: Mapping[str, Any], where: str) -> tuple[bool, str]:
        columns = self._columns
        label = columns.label(row, where)
        columns.prompt(row, where)
        columns.weight(row, where)
        if label == "both":
            drop = self.both == "drop" or (self.both == "disliked" and self.keep == "liked")
            return not drop, f"{_BOTH} {'dropped' if drop else f'taken as {self.both}'}"
        if label is None:
            return self.keep != "labelled", "rows without a label dropped" if self.keep == "labelled" else ""
        if label == 0.5:
            return False, "undecided images dropped"
        # A dislike can yet tell that an image is not liked throughout.
        if self.keep == "liked" and label < 0.5 and not (self.merge and self.both != "liked"):
            return False, "disliked images dropped"
        return True, ""

    def record(self, row: Mapping[str, Any], index: int, where: str, root: Path | None) -> LabelledImage:
        columns = self._columns
        label, name = columns.label(row, where), columns.value(row, "id")
        if label == "both":
            label = 1.0 if self.both == "liked" else 0.0
        column = columns.names["image"]
        return LabelledImage(
            id=str(index) if name is None else str(name),
            prompt=columns.prompt(row, where),
            image=EncodedImage.wrap(row.get(column), f"{where}, column {column}", root),
            label=label,
            weight=columns.weight(row, where),
            where=where,
        )

    def select(self, plans: list[Plan]) -> list[Plan]:
        if self.merge:
            plans = merge_equal(plans, self.both)
        if self.keep == "liked":
            plans = [plan for plan in plans if (label := plan.numbers["label"]) is None or label > 0.5]
        return plans


def merge_equal(plans: Sequence[Plan], both: Both) -> list[Plan]:
    """One plan for each picture and prompt, the first; its label and weight are the means over all.

    Args:
        plans: of single images.
        both: what an image is that is liked (label above 0.5) in some and disliked in others: "liked" (label 1),
            "disliked" (0), or left out ("drop").
    """
    groups: dict[tuple[str, str], list[Plan]] = {}
    for plan in plans:
        groups.setdefault((plan.digests[0], plan.prompt), []).append(plan)
    merged, counts = [], Counter[str]()
    for group in groups.values():
        counts["repeated images merged"] += len(group) - 1
        labels = [label for plan in group if (label := plan.numbers["label"]) is not None]
        label = sum(labels) / len(labels) if labels else None
        if labels and max(labels) > 0.5 > min(labels):
            counts[f"{_BOTH} {'dropped' if both == 'drop' else f'taken as {both}'}"] += 1
            if both == "drop":
                continue
            label = 1.0 if both == "liked" else 0.0
        weights = [plan.numbers["weight"] or 0.0 for plan in group]
        merged.append(replace(group[0], numbers={"label": label, "weight": sum(weights) / len(weights)}))
    if notes := [f"{count} {what}" for what, count in counts.items() if count]:
        logger.info("%d images: %s", len(merged), "; ".join(notes))
    return merged


def _images_of(pair: Pair, sides: Sequence[str]) -> list[LabelledImage]:
    _, *own = pair.captions
    labels = {"chosen": pair.label, "rejected": 1 - pair.label}
    captions = dict(zip(Pair.SIDES, own, strict=True))
    return [
        LabelledImage(
            id=f"{pair.id} {side}",
            prompt=pair.prompt if (caption := captions[side]) is None else caption,
            image=getattr(pair, side),
            label=labels[side],
            where=pair.where,
        )
        for side in sides
    ]


class ImagesOfPairs(Source[LabelledImage]):
    """The images of pairs, one by one; what becomes of the rows is counted by the pairs."""

    def __init__(self, pairs: PairSource, reading: ImageReading, sides: Sequence[str]) -> None:
        self.name, self.reading, self.limit = pairs.name, reading, pairs.limit
        self.noun, self.select = reading.noun, reading.select
        self.bad_rows, self.counts = pairs.bad_rows, pairs.counts
        self._pairs, self._sides = pairs, tuple(sides)

    def __len__(self) -> int:
        return len(self._pairs) * len(self._sides)

    def __getitem__(self, index: int) -> LabelledImage:
        pair, side = divmod(index, len(self._sides))
        return _images_of(self._pairs[pair], self._sides[side : side + 1])[0]

    def fingerprint(self) -> str | None:
        inner = self._pairs.fingerprint()
        return inner and repr((inner, self._sides))


class ImagesOfPairStream(Stream[LabelledImage]):
    """The images of streamed pairs."""

    def __init__(self, pairs: PairStream, reading: ImageReading, sides: Sequence[str]) -> None:
        self.name, self.reading, self.limit = pairs.name, reading, pairs.limit
        self.noun, self.select = reading.noun, reading.select
        self.bad_rows = pairs.bad_rows
        self._pairs, self._sides = pairs, tuple(sides)

    def __iter__(self) -> Iterator[LabelledImage]:
        for pair in self._pairs:
            yield from _images_of(pair, self._sides)


def open_images(
    name_or_path: str | Path | Any,
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    keep: Literal["all", "labelled", "liked"] = "all",
    merge: bool = True,
    both: Both = "liked",
    rankings: str = "all",
    seed: int = 0,
    streaming: bool = False,
    max_bad_rows: int = 10,
    max_samples: int | None = None,
) -> Source[LabelledImage] | Stream[LabelledImage]:
    """Open a data set of single images, or of pairs whose images are taken one by one.

    Args:
        name_or_path, split, config_name, rankings, seed, streaming, max_bad_rows: see
            :func:`diffalign.data.readers.open_pairs`. Known besides are images beside captions in ``*.txt``.
        columns: field to column, of :class:`ImageColumns` or, for pairs, of :class:`diffalign.data.columns.Columns`.
        keep: "all" images; "labelled" ones, where a source without labels is an error; or all but the disliked ones
            ("liked").
        merge: images of equal content and prompt are one image.
        both: what an image is that is both liked and disliked: one of Diffusion-KTO's ``intersections``, or one that
            appears with both labels and is merged. In Pick-a-Pic the "liked" are then those that won at least once.
        max_samples: stop after this many rows, of images or of pairs. Ties of pairs are always dropped.

    Raises:
        UserError: see :func:`diffalign.data.readers.open_pairs`; or no labels where they are needed.
    """
    table = open_table(name_or_path, split=split, config_name=config_name, streaming=streaming)
    table, columns = expand_rankings(table, columns, rankings, seed=seed, max_bad_rows=max_bad_rows)
    if _holds_pairs(table.columns, columns):
        pairs = pairs_of(table, columns, max_bad_rows=max_bad_rows, max_pairs=max_samples)
        reading = ImageReading(None, keep, merge, both)
        sides = Pair.SIDES if keep != "liked" or (merge and both != "liked") else Pair.SIDES[:1]
        if isinstance(pairs, PairStream):
            return ImagesOfPairStream(pairs, reading, sides)
        return ImagesOfPairs(pairs, reading, sides)
    found = ImageColumns(table.columns, columns, table.name)
    if keep == "labelled" and not {"label", "split"} & found.names.keys():
        raise UserError(
            f"{table.name} does not say which images are liked. Columns found: {', '.join(table.columns)}. Add a "
            "column label (1 liked, 0 disliked) or map one (columns: {label: my_column}); or give preference pairs, "
            "whose chosen images are liked and whose rejected ones are not, made with a reward by `diffalign pairs`."
        )
    reading = ImageReading(found, keep, merge, both)
    if isinstance(table, StreamTable):
        return Stream(table, reading, max_bad_rows=max_bad_rows, limit=max_samples)
    return Source(table, reading, max_bad_rows=max_bad_rows, limit=max_samples)


def _holds_pairs(found: Iterable[str], columns: Mapping[str, str] | None) -> bool:
    """Whether a table has the two pictures of pairs, and no single ones that the configuration names."""
    mapped = set(columns or {})
    if "image" in mapped:
        return False
    names = set(found)
    two = [{"chosen", "rejected"}, {"image_0", "image_1"}]
    return any(all(side in mapped or names & set(Columns.ALIASES[side]) for side in sides) for sides in two)
