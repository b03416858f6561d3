"""Open a data set of preferences, in any of the known layouts, as pairs.

What can be checked without opening pictures is checked here, for every row, before anything else happens: columns,
labels, prompts. Ties and rows without a label are counted and reported; bad rows are skipped and listed up to a limit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.data.columns import BadRow, Columns
from diffalign.data.images import BadImage
from diffalign.data.layouts import Table, open_table
from diffalign.data.records import Pair
from diffalign.data.tables import StreamTable
from diffalign.errors import UserError

logger = logging.getLogger(__name__)

Ties = Literal["drop", "keep", "error"]


class BadRows:
    """Rows that were skipped, with the reason for each, up to a limit.

    Raises (from :meth:`add`):
        UserError: more than ``limit`` rows are bad; all of them are listed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reasons: list[str] = []

    def add(self, error: Exception | str) -> None:
        self.reasons.append(str(error))
        logger.warning("skipped a bad row: %s", error)
        if len(self.reasons) > self.limit:
            raise UserError(
                f"{len(self.reasons)} bad rows, more than max_bad_rows = {self.limit}. Correct them, or raise the "
                "limit if the rest of the set is sound:\n  " + "\n  ".join(self.reasons)
            )


@dataclass
class Counts:
    """What became of the rows of a source."""

    rows: int = 0
    pairs: int = 0
    ties: int = 0
    unlabelled: int = 0
    bad: list[str] = field(default_factory=list)

    def text(self, name: str, ties: Ties) -> str:
        """One line for the log."""
        parts = [f"{name}: {self.pairs} pairs of {self.rows} rows"]
        if self.ties:
            parts.append(f"{self.ties} ties {'kept with label 0.5' if ties == 'keep' else 'dropped'}")
        if self.unlabelled:
            parts.append(f"{self.unlabelled} rows without a label dropped")
        if self.bad:
            parts.append(f"{len(self.bad)} bad rows skipped")
        return "; ".join(parts)


class _Source:
    """What map-style and streamed sources share: how a row is judged."""

    def __init__(self, table: Table, columns: Columns, ties: Ties, max_bad_rows: int, max_pairs: int | None) -> None:
        self.name, self.columns, self.ties, self.max_pairs = table.name, columns, ties, max_pairs
        self.bad_rows = BadRows(max_bad_rows)
        self.counts = Counts(bad=self.bad_rows.reasons)

    def _keeps(self, row: Mapping[str, Any], where: str) -> bool:
        """Count a row, and say whether it is a pair. Pictures are not looked at."""
        self.counts.rows += 1
        try:
            preference = self.columns.preference(row, where)
            self.columns.texts(row, where)
        except BadRow as error:
            self.bad_rows.add(error)
            return False
        if preference is None:
            self.counts.unlabelled += 1
            return False
        if preference == 0.5:
            self.counts.ties += 1
            if self.ties == "error":
                raise UserError(
                    f"{where}: a tie (label 0.5). Remove it, or choose what becomes of ties: ties: drop | keep."
                )
            if self.ties == "drop":
                return False
        self.counts.pairs += 1
        return True

    def _report(self) -> None:
        text = self.counts.text(self.name, self.ties)
        if not self.counts.pairs:
            raise UserError(f"{text}. There is nothing to train on; keep ties (ties: keep) or give other data.")
        logger.log(logging.INFO if self.counts.rows == self.counts.pairs else logging.WARNING, "%s", text)


class PairSource(_Source):
    """A data set with random access: ``len(source)``, ``source[i]`` a :class:`Pair` whose pictures are not opened yet.

    ``counts`` says what became of the rows, ``bad_rows`` collects bad ones (also those that are found later, when
    pictures are opened).
    """

    def __init__(
        self, table: Any, columns: Columns, *, ties: Ties, max_bad_rows: int, max_pairs: int | None = None
    ) -> None:
        super().__init__(table, columns, ties, max_bad_rows, max_pairs)
        self._table = table
        self._rows: list[int] = []
        for index, row in enumerate(table.scan(columns.light)):
            if max_pairs is not None and len(self._rows) >= max_pairs:
                break
            if self._keeps(row, table.where(index)):
                self._rows.append(index)
        self._report()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        """The pair. Raises BadImage where a picture is missing from the row."""
        row = self._rows[index]
        return self.columns.pair(self._table.row(row), row, self._table.where(row), self._table.root)

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str | None:
        """Identifies the pairs of this source as it was opened; None where pictures are files that may change."""
        table = self._table.fingerprint(self.columns.images)
        return table and repr((table, sorted(self.columns.names.items()), self.ties, self.max_pairs))


class PairStream(_Source):
    """A streamed data set: pairs come once, in order; ``counts`` is complete, and reported, at the end."""

    def __init__(
        self, table: StreamTable, columns: Columns, *, ties: Ties, max_bad_rows: int, max_pairs: int | None = None
    ) -> None:
        super().__init__(table, columns, ties, max_bad_rows, max_pairs)
        self._table = table

    def __iter__(self) -> Iterator[Pair]:
        """The pairs. Raises UserError at the end where there was none, or at too many bad rows."""
        self.bad_rows.reasons.clear()
        self.counts = Counts(bad=self.bad_rows.reasons)
        for index, row in enumerate(self._table):
            if self.max_pairs is not None and self.counts.pairs >= self.max_pairs:
                break
            where = self._table.where(index)
            if not self._keeps(row, where):
                continue
            try:
                yield self.columns.pair(row, index, where, None)
            except BadImage as error:
                self.counts.pairs -= 1
                self.bad_rows.add(error)
        self._report()


def open_pairs(
    name_or_path: str | Path | Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    streaming: bool = False,
    max_bad_rows: int = 10,
    max_pairs: int | None = None,
) -> PairSource | PairStream:
    """Open a data set of preferences.

    Args:
        name_or_path: a file or folder (parquet, arrow, saved by ``datasets``, JSON or JSONL with image files, folders
            chosen/ and rejected/), a hub id, the bundled "shapes-pairs", a ``datasets`` object or a list of dicts.
        split: the split to read.
        columns: field to column, where the names differ from those looked for: ``{"prompt": "my_caption"}``.
        ties: what becomes of rows labelled 0.5: "drop", "keep" (label 0.5) or "error". Counts are logged either way.
        streaming: read a hub data set row by row, without downloading it first.
        max_bad_rows: how many bad rows may be skipped before it is an error.
        max_pairs: stop after this many pairs.

    Raises:
        UserError: nothing there, an unknown layout or split, a missing column, a label outside [0, 1], too many bad
            rows, or no pairs left.
    """
    if ties not in ("drop", "keep", "error"):
        raise UserError(f"ties: {ties!r} is unknown. Choose drop, keep or error.")
    table = open_table(name_or_path, split=split, streaming=streaming)
    found = Columns(table.columns, columns, table.name)
    opened = PairStream if isinstance(table, StreamTable) else PairSource
    return opened(table, found, ties=ties, max_bad_rows=max_bad_rows, max_pairs=max_pairs)  # type: ignore[arg-type]
