"""Several images of one prompt, ranked or scored, as preference pairs.

Two layouts: a row with lists (``images, rank`` or ``images, scores``; HPDv2's test set calls the first
``image_path``), and a row for each image (``image, rank, prompt_id``), as in ImageRewardDB. Rank 1 is best, of scores
the highest; equal ones make no pair. Which pairs are made of a list:

- "all": each of different rank;
- "adjacent": each of ranks that follow one another;
- "best-worst": the best and the worst, one pair;
- a number n: n of "all", drawn by seed and list.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from diffalign.data.fields import BadRow, Fields
from diffalign.data.layouts import Table
from diffalign.data.sources import BadRows
from diffalign.data.tables import ArrowTable, Row, RowsTable, StreamTable
from diffalign.diffusion.random import keyed_permutation
from diffalign.errors import UserError

logger = logging.getLogger(__name__)

_TELLING = {"images", "image_path", "prompt_id", "group"}
"""Columns (or mapped fields) that tell a ranking from other tables that happen to hold scores."""


Place = tuple[int, int | None]
"""A row, and which picture of its list; None where the row holds one picture."""


class RankingFields(Fields):
    """The columns of ranked images."""

    ALIASES = {
        "images": ("images", "image_path", "image", "file_name", "file_path"),
        "rank": ("rank", "ranks"),
        "scores": ("scores",),
        "group": ("prompt_id", "group_id"),
        "prompt": ("prompt", "caption", "text"),
        "user_id": ("user_id",),
        "id": ("id",),
    }

    def __init__(self, found: Iterable[str], mapping: Mapping[str, str] | None = None, source: str = "data") -> None:
        super().__init__(found, mapping, source)
        self._require(["prompt", "images"])

    def levels(self, row: Row, where: str) -> list[float]:
        """The place of each image in a list, lower is better. Raises BadRow where there are no such numbers."""
        field = "rank" if "rank" in self.names else "scores"
        values = self.value(row, field)
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) or v != v for v in values):
            raise BadRow(
                f"{where}: {self.names[field]} is {self.value(row, field)!r}, expected numbers. Correct the row."
            )
        return [float(v) if field == "rank" else -float(v) for v in values]


def ranked_pairs(levels: Sequence[float], which: str, key: Sequence[int | str] = ()) -> list[tuple[int, int]]:
    """Index pairs (better, worse) of one list.

    Args:
        levels: place of each image, lower is better; equal ones are ties.
        which: "all", "adjacent", "best-worst", or a number as text; see the module.
        key: of the random numbers, for a number.

    Raises:
        UserError: another ``which``.
    """
    order = sorted(range(len(levels)), key=lambda i: (levels[i], i))
    strict = [(a, b) for a, b in itertools.combinations(order, 2) if levels[a] < levels[b]]
    if which == "all":
        return strict
    if which == "adjacent":
        distinct = sorted(set(levels))
        following = set(itertools.pairwise(distinct))
        return [(a, b) for a, b in strict if (levels[a], levels[b]) in following]
    if which == "best-worst":
        worst = [b for _, b in strict if levels[b] == max(levels)]
        return [(order[0], worst[0])] if strict else []
    if which.isdecimal() and int(which) > 0:
        return [strict[i] for i in sorted(keyed_permutation(len(strict), *key, "ranking")[: int(which)].tolist())]
    raise UserError(f"rankings: {which!r} is unknown. Choose all, adjacent, best-worst, or a number of random pairs.")


class RankedTable:
    """The pairs of a table of rankings, as a table of the columns ``prompt, chosen, rejected, margin, id``.

    ``margin`` is the difference of the scores, or of the ranks.
    """

    def __init__(
        self, table: ArrowTable | RowsTable, fields: RankingFields, which: str, *, seed: int, max_bad_rows: int
    ) -> None:
        self.name, self.root = table.name, table.root
        self._table, self._fields, self._which, self._seed = table, fields, which, seed
        self.columns = ["prompt", "chosen", "rejected", "margin", "id"]
        if "user_id" in fields.names:
            self.columns.append("user_id")
        bad = BadRows(max_bad_rows)
        self._pairs: list[tuple[Place, Place, float, str]] = []
        lists = self._lists(bad)
        single = sum(len(places) == 1 for _, places, _ in lists)
        if single == len(lists):
            raise UserError(
                f"{self.name}: no list holds more than one image. Rows of single images belong together by the "
                "column prompt_id; name it: columns: {group: my_column}."
            )
        for name, places, levels in lists:
            for a, b in ranked_pairs(levels, which, (seed, name)):
                self._pairs.append((places[a], places[b], levels[b] - levels[a], f"{name} {a} {b}"))
        logger.info("%s: %d pairs (%s) of %d ranked lists", self.name, len(self._pairs), which, len(lists))

    def _lists(self, bad: BadRows) -> list[tuple[str, list[Place], list[float]]]:
        """(name, place of each image, levels) of every list."""
        fields = self._fields
        found: dict[str, tuple[list[Place], list[float]]] = {}
        wanted = [fields.names[field] for field in ("rank", "scores", "group", "id") if field in fields.names]
        for index, row in enumerate(self._table.scan(wanted)):
            try:
                levels = fields.levels(row, self._table.where(index))
            except BadRow as error:
                bad.add(error)
                continue
            # Rows of one image carry the name of their list; a list in one row is a list of its own.
            alone = len(levels) == 1
            name = fields.value(row, "group" if alone else "id")
            name = str(index if name is None else name)
            known = found.setdefault(name, ([], []))
            known[0].extend((index, None if alone else number) for number in range(len(levels)))
            known[1].extend(levels)
        return [(name, *content) for name, content in found.items()]

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> Row:
        better, worse, margin, name = self._pairs[index]
        row = self._table.row(better[0])
        other = row if worse[0] == better[0] else self._table.row(worse[0])
        return {
            "prompt": self._fields.value(row, "prompt"),
            "chosen": self._picture(row, better[1]),
            "rejected": self._picture(other, worse[1]),
            "margin": margin,
            "id": name,
            "user_id": self._fields.value(row, "user_id"),
        }

    def _picture(self, row: Row, number: int | None) -> Any:
        pictures = self._fields.value(row, "images")
        if number is None or pictures is None:
            return pictures
        return pictures[number] if number < len(pictures) else None

    def where(self, index: int) -> str:
        better, worse, *_ = self._pairs[index]
        if better[0] == worse[0]:
            return f"{self._table.where(better[0])}, images {better[1]} and {worse[1]}"
        return f"{self._table.where(better[0])} and {self._table.where(worse[0])}"

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows in order, without their pictures."""
        names = self._fields.names
        texts: list[dict[str, Any]] = [
            {field: row.get(names[field]) for field in ("prompt", "user_id") if field in names}
            for row in self._table.scan([names[field] for field in ("prompt", "user_id") if field in names])
        ]
        for better, _, margin, name in self._pairs:
            yield {**texts[better[0]], "margin": margin, "id": name}

    def fingerprint(self, images: Sequence[str]) -> str | None:
        """Changes with the source and with which pairs are made of it."""
        inner = self._table.fingerprint([self._fields.names["images"]])
        return inner and repr((inner, sorted(self._fields.names.items()), self._which, self._seed))


def is_ranking(table: Table, columns: Mapping[str, str] | None = None) -> bool:
    """Whether the rows of a table are ranked images, by the names of its columns."""
    names = {*table.columns, *(columns or {})}
    paired = names & {"chosen", "rejected", "label", "label_0", "human_preference"}
    return not paired and bool(names & {"rank", "ranks", "scores"}) and bool(names & _TELLING)


def expand_rankings(
    table: Table, columns: Mapping[str, str] | None, which: str, *, seed: int, max_bad_rows: int
) -> tuple[Any, Mapping[str, str] | None]:
    """The pairs of a table of rankings and the mapping of columns that is left; another table as it is.

    Raises:
        UserError: rankings that are streamed, an unknown ``which``, no prompts, or too many bad rows.
    """
    ranked_pairs([0.0], which)
    if not is_ranking(table, columns):
        return table, columns
    if isinstance(table, StreamTable):
        raise UserError(f"{table.name} is streamed, and pairs of rankings need random access: do not stream it.")
    fields = RankingFields(table.columns, columns, table.name)
    return RankedTable(table, fields, which, seed=seed, max_bad_rows=max_bad_rows), None
