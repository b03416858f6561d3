"""Open a data set of preferences, in any of the known layouts, as pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffalign.data.columns import Columns
from diffalign.data.layouts import Table, open_table
from diffalign.data.ranked import expand_rankings
from diffalign.data.records import Pair
from diffalign.data.sources import Source, Stream
from diffalign.data.tables import StreamTable
from diffalign.errors import UserError

if TYPE_CHECKING:
    from diffalign.data.plans import Plan

Ties = Literal["drop", "keep", "error"]


@dataclass(frozen=True)
class PairReading:
    """Rows of a table as pairs; see :class:`diffalign.data.sources.Reading`."""

    noun: ClassVar[str] = "pairs"
    remedy: ClassVar[str] = "keep ties (ties: keep) or give other data"

    columns: Columns
    ties: Ties

    @property
    def light(self) -> list[str]:
        return self.columns.light

    @property
    def images(self) -> tuple[str, str]:
        return self.columns.images

    @property
    def identity(self) -> str:
        return repr((sorted(self.columns.names.items()), self.ties))

    def judge(self, row: Mapping[str, Any], where: str) -> tuple[bool, str]:
        preference = self.columns.preference(row, where)
        self.columns.texts(row, where)
        if preference is None:
            return False, "rows without a label dropped"
        if preference != 0.5:
            return True, ""
        if self.ties == "error":
            raise UserError(
                f"{where}: a tie (label 0.5). Remove it, or choose what becomes of ties: ties: drop | keep."
            )
        return (True, "ties kept with label 0.5") if self.ties == "keep" else (False, "ties dropped")

    def record(self, row: Mapping[str, Any], index: int, where: str, root: Path | None) -> Pair:
        return self.columns.pair(row, index, where, root)

    def select(self, plans: list[Plan]) -> list[Plan]:
        return plans


class PairSource(Source[Pair]):
    """Pairs with random access."""

    reading: PairReading

    @property
    def columns(self) -> Columns:
        """The columns of the pairs."""
        return self.reading.columns


class PairStream(Stream[Pair]):
    """Pairs that come once, in order."""

    reading: PairReading

    @property
    def columns(self) -> Columns:
        """The columns of the pairs."""
        return self.reading.columns


def open_pairs(
    name_or_path: str | Path | Any,
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    rankings: str = "all",
    seed: int = 0,
    streaming: bool = False,
    max_bad_rows: int = 10,
    max_pairs: int | None = None,
) -> PairSource | PairStream:
    """Open a data set of preferences.

    Args:
        name_or_path: a file or folder (parquet, arrow, webdataset tars, saved by ``datasets``, JSON or JSONL with
            image files, folders chosen/ and rejected/), a hub id, the bundled "shapes-pairs", a ``datasets`` object
            or a list of dicts.
        split: the split to read.
        config_name: the configuration of a hub data set that has several.
        columns: field to column, where the names differ from those looked for: ``{"prompt": "my_caption"}``.
        ties: what becomes of rows labelled 0.5: "drop", "keep" (label 0.5) or "error". Counts are logged either way.
        rankings: which pairs are made of several ranked images of a prompt, see :mod:`diffalign.data.ranked`.
        seed: for pairs of rankings that are drawn at random.
        streaming: read a hub data set row by row, without downloading it first.
        max_bad_rows: how many bad rows may be skipped before it is an error.
        max_pairs: stop after this many pairs.

    Raises:
        UserError: nothing there, an unknown layout or split, a missing column, a label outside [0, 1], too many bad
            rows, or no pairs left.
    """
    table = open_table(name_or_path, split=split, config_name=config_name, streaming=streaming)
    table, columns = expand_rankings(table, columns, rankings, seed=seed, max_bad_rows=max_bad_rows)
    return pairs_of(table, columns, ties=ties, max_bad_rows=max_bad_rows, max_pairs=max_pairs)


def pairs_of(
    table: Table,
    columns: Mapping[str, str] | None = None,
    *,
    ties: Ties = "drop",
    max_bad_rows: int = 10,
    max_pairs: int | None = None,
) -> PairSource | PairStream:
    """The pairs of an open table; arguments and errors are those of :func:`open_pairs`."""
    if ties not in ("drop", "keep", "error"):
        raise UserError(f"ties: {ties!r} is unknown. Choose drop, keep or error.")
    reading = PairReading(Columns(table.columns, columns, table.name), ties)
    if isinstance(table, StreamTable):
        return PairStream(table, reading, max_bad_rows=max_bad_rows, limit=max_pairs)
    return PairSource(table, reading, max_bad_rows=max_bad_rows, limit=max_pairs)
