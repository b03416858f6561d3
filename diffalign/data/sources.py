"""From a table to records, with random access or as a stream.

What can be checked without opening pictures is checked here, for every row, before anything else happens. Rows that
are left out are counted by reason and reported; bad rows are skipped and listed up to a limit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from diffalign.data.columns import BadRow
from diffalign.data.images import BadImage
from diffalign.data.records import Record
from diffalign.data.tables import StreamTable
from diffalign.errors import UserError

if TYPE_CHECKING:
    from diffalign.data.plans import Plan

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)


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
    """What became of the rows of a source: ``noted`` counts by reason, such as "ties dropped"."""

    rows: int = 0
    kept: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def text(self, name: str, noun: str) -> str:
        """One line for the log."""
        parts = [f"{name}: {self.kept} {noun} of {self.rows} rows"]
        parts += [f"{count} {reason}" for reason, count in self.noted.items()]
        if self.bad:
            parts.append(f"{len(self.bad)} bad rows skipped")
        return "; ".join(parts)


class Reading(Protocol[R_co]):
    """How the rows of one table become records of one kind."""

    noun: ClassVar[str]
    """What the records are called, in the plural."""
    remedy: ClassVar[str]
    """What to do where no row is left."""

    @property
    def light(self) -> Sequence[str]:
        """The columns beside the pictures."""

    @property
    def images(self) -> Sequence[str]:
        """The columns of the pictures."""

    @property
    def identity(self) -> str:
        """Changes with everything that changes the records of a table."""

    def judge(self, row: Mapping[str, Any], where: str) -> tuple[bool, str]:
        """Whether a row becomes a record, and a reason to count it under, or "". Pictures are not looked at.

        Raises:
            BadRow: the row is skipped. Any other UserError stops the reading.
        """

    def record(self, row: Mapping[str, Any], index: int, where: str, root: Path | None) -> R_co:
        """The record of a row that was kept. Raises BadImage where a picture is missing from it."""

    def select(self, plans: list[Plan]) -> list[Plan]:
        """What is left of all samples once their pictures were looked at, such as one of each picture."""


class _Base(Generic[R]):
    def __init__(self, table: Any, reading: Reading[R], max_bad_rows: int, limit: int | None) -> None:
        self.name, self.reading, self.limit = table.name, reading, limit
        self.noun, self.select = reading.noun, reading.select
        self.bad_rows = BadRows(max_bad_rows)
        self.counts = Counts(bad=self.bad_rows.reasons)
        self._table = table

    def _keeps(self, row: Mapping[str, Any], where: str) -> bool:
        self.counts.rows += 1
        try:
            keeps, reason = self.reading.judge(row, where)
        except BadRow as error:
            self.bad_rows.add(error)
            return False
        if reason:
            self.counts.noted[reason] += 1
        self.counts.kept += keeps
        return keeps

    def _report(self) -> None:
        text = self.counts.text(self.name, self.noun)
        if not self.counts.kept:
            raise UserError(f"{text}. There is nothing to train on; {self.reading.remedy}.")
        logger.log(logging.INFO if self.counts.rows == self.counts.kept else logging.WARNING, "%s", text)


class Source(_Base[R]):
    """A data set with random access: ``len(source)``, ``source[i]`` a record whose pictures are not opened yet.

    ``counts`` says what became of the rows, ``bad_rows`` collects bad ones (also those that are found later, when
    pictures are opened).
    """

    def __init__(self, table: Any, reading: Reading[R], *, max_bad_rows: int, limit: int | None = None) -> None:
        super().__init__(table, reading, max_bad_rows, limit)
        self._rows: list[int] = []
        for index, row in enumerate(table.scan(reading.light)):
            if limit is not None and len(self._rows) >= limit:
                break
            if self._keeps(row, table.where(index)):
                self._rows.append(index)
        self._report()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> R:
        """The record. Raises BadImage where a picture is missing from the row."""
        row = self._rows[index]
        return self.reading.record(self._table.row(row), row, self._table.where(row), self._table.root)

    def __iter__(self) -> Iterator[R]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str | None:
        """Identifies the records of this source as it was opened; None where pictures are files that may change."""
        table = self._table.fingerprint(self.reading.images)
        return table and repr((table, self.reading.identity, self.limit))


class Stream(_Base[R]):
    """A streamed data set: records come once, in order; ``counts`` is complete, and reported, at the end."""

    def __init__(
        self, table: StreamTable, reading: Reading[R], *, max_bad_rows: int, limit: int | None = None
    ) -> None:
        super().__init__(table, reading, max_bad_rows, limit)

    def __iter__(self) -> Iterator[R]:
        """The records. Raises UserError at the end where there was none, or at too many bad rows."""
        self.bad_rows.reasons.clear()
        self.counts = Counts(bad=self.bad_rows.reasons)
        for index, row in enumerate(self._table):
            if self.limit is not None and self.counts.kept >= self.limit:
                break
            where = self._table.where(index)
            if not self._keeps(row, where):
                continue
            try:
                yield self.reading.record(row, index, where, None)
            except BadImage as error:
                self.counts.kept -= 1
                self.bad_rows.add(error)
        self._report()
