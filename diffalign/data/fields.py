"""Which column holds what: fields of a record, the columns they are looked for in, and how a value is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from diffalign.errors import UserError, did_you_mean


class BadRow(UserError):
    """A row that cannot be used. The message names it, says why, and what to do."""


class BadLabel(UserError):
    """A label that is no probability: a wrong column or scale, hence not a matter of one row."""


class Fields:
    """The columns of one source. ``names`` maps field to column, for the fields that are there.

    Args:
        found: the columns of the source.
        mapping: field to column, from the configuration; wins over the names looked for otherwise.
        source: name of the source, for errors.

    Raises:
        UserError: an unknown field, or a mapped column that is not there; the columns found are listed.
    """

    ALIASES: ClassVar[Mapping[str, Sequence[str]]]
    """Fields that a configuration can map (``columns: {prompt: my_caption}``), and the columns looked for else."""

    LABEL_MEANS: ClassVar[str]
    """What a label is, for errors."""

    def __init__(self, found: Iterable[str], mapping: Mapping[str, str] | None = None, source: str = "data") -> None:
        self.found, self.source = list(found), source
        mapping = dict(mapping or {})
        for field, column in mapping.items():
            if field not in self.ALIASES:
                hint = did_you_mean(field, self.ALIASES)
                raise UserError(f"columns: unknown field {field!r}.{hint} Fields: {', '.join(self.ALIASES)}.")
            if column not in self.found:
                hint = did_you_mean(column, self.found)
                raise UserError(f"{source}: there is no column {column!r} (columns: {field}).{hint} {self._listed}")
        self.names = {
            field: mapping.get(field) or next(name for name in aliases if name in self.found)
            for field, aliases in self.ALIASES.items()
            if field in mapping or any(name in self.found for name in aliases)
        }

    @property
    def _listed(self) -> str:
        return f"Columns found: {', '.join(self.found) or 'none'}."

    def _require(self, needed: Sequence[str]) -> None:
        missing = [field for field in needed if field not in self.names]
        if missing:
            hints = {did_you_mean(name, self.found) for field in missing for name in self.ALIASES[field]} - {""}
            example = f"columns: {{{missing[0]}: {(self.found or ['my_column'])[0]}}}"
            looked = "; ".join(f"{field} ({', '.join(self.ALIASES[field])})" for field in missing)
            raise UserError(
                f"{self.source}: no column for {looked}.{''.join(sorted(hints)[:1])} {self._listed} "
                f"Name it in the configuration, for example `{example}`."
            )

    def value(self, row: Mapping[str, Any], field: str) -> Any:
        """What a row holds for a field; None where it holds nothing."""
        return row.get(self.names[field]) if field in self.names else None

    def _probability(self, row: Mapping[str, Any], field: str, where: str) -> float | None:
        value = self.value(row, field)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise BadLabel(
                f"{where}: {self.names[field]} is {value!r}, outside [0, 1]. {self.LABEL_MEANS}: rescale it, or map "
                "another column."
            )
        return number

    def _text(self, row: Mapping[str, Any], field: str, where: str) -> str | None:
        value = self.value(row, field)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if value is not None and not isinstance(value, str):
            raise BadRow(f"{where}: {self.names[field]} is {value!r}, not text. Correct it, or map another column.")
        return value
