"""Tables: columns, rows by number, and a name for every row. Nothing here knows what a preference is."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]


class RowsTable:
    """Rows in memory; pictures as paths relative to ``root`` (or as anything a picture can be).

    ``names`` says where each row comes from; ``plain`` are the columns that hold no pictures.
    """

    def __init__(self, name: str, rows: Sequence[Row], names: Sequence[str], root: Path | None = None) -> None:
        self.name, self.root = name, root
        self._rows, self._names = rows, names
        self.columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        self.plain = self.columns

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._rows[index]

    def where(self, index: int) -> str:
        return self._names[index]

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows in order; only ``columns`` need be there."""
        return iter(self._rows)

    def fingerprint(self, images: Sequence[str]) -> str | None:
        """None: the pictures are files that may change while the list does not."""
        return None


class ArrowTable:
    """A ``datasets.Dataset``; pictures stay encoded.

    ``files`` are the source files with their numbers of rows, in order, where they are known.
    """

    def __init__(
        self,
        name: str,
        dataset: datasets.Dataset,
        files: Sequence[tuple[Path, int]] = (),
        root: Path | None = None,
    ) -> None:
        self.name, self.root = name, root
        self._dataset = _undecoded(dataset)
        self._files = [path for path, _ in files]
        self._ends = list(itertools.accumulate(rows for _, rows in files))
        self.columns = list(dataset.column_names)
        self.plain = [name for name, feature in (dataset.features or {}).items() if _is_plain(feature)]

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int) -> Row:
        return self._dataset[index]

    def where(self, index: int) -> str:
        if not self._ends:
            return f"{self.name} row {index}"
        which = bisect.bisect_right(self._ends, index)
        return f"{self._files[which]} row {index - (self._ends[which - 1] if which else 0)}"

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows in order, with only ``columns``, so that the pictures are not read."""
        for batch in self._dataset.select_columns(list(columns)).iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def fingerprint(self, images: Sequence[str]) -> str | None:
        """Changes with the source; None where the pictures (columns ``images``) are files of their own."""
        for value in (self._dataset[0][name] for name in images if len(self._dataset)):
            value = value[0] if isinstance(value, list) and value else value
            if not (value.get("bytes") if isinstance(value, dict) else isinstance(value, bytes)):
                return None
        if self._files:
            stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files]
            return repr(stats)
        return str(self._dataset._fingerprint)


class StreamTable:
    """A ``datasets.IterableDataset``: rows come once, in order, and their number is not known."""

    root = None

    def __init__(self, name: str, dataset: datasets.IterableDataset) -> None:
        self.name = name
        self._dataset = _undecoded(dataset)
        if not self._dataset.column_names:
            self._dataset = self._dataset._resolve_features()
        self.columns = list(self._dataset.column_names)

    def where(self, index: int) -> str:
        return f"{self.name} row {index}"

    def __iter__(self) -> Iterator[Row]:
        return iter(self._dataset)


def _is_plain(feature: Any) -> bool:
    """Whether a column holds texts and numbers, rather than pictures, sounds or other bytes."""
    import datasets

    if isinstance(feature, Mapping):
        return all(map(_is_plain, feature.values()))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _is_plain(inner)
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and "binary" not in feature.dtype
    )


def _undecoded(dataset: Any) -> Any:
    """The data set with plain Python rows and its pictures as they are stored."""
    import datasets

    dataset = dataset.with_format(None)
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset
