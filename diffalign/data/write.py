"""Writing pairs in the one form that every reader here reads: a parquet file in the columns of Pick-a-Pic.

===========================  =========================================================================================
``caption``                  the prompt
``jpg_0, jpg_1``             image files as bytes, in whatever format they were (the names are Pick-a-Pic's)
``label_0, label_1``         probability that the first image, and that the second, is preferred
``caption_0, caption_1``     captions of the single images (DCPO), where there are any
``id``                       keys the random numbers of the pair in training
``margin``                   by how much the first image won
``score_0, score_1``         total score of each image where a scorer chose; ``scores`` all of them, as JSON
``seed_0, seed_1``           seeds of images that were drawn; ``model_0, model_1`` what drew them
``difficulty``               held-out loss of the pair, see :mod:`diffalign.making.difficulty`
``user_id, source``          who chose; where the pair is from
===========================  =========================================================================================

Columns of which no pair has a value are left out.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data.images import EncodedImage
from diffalign.data.records import Pair
from diffalign.errors import UserError

ROW_GROUP_BYTES = 64 << 20
"""A row group is closed at this size: readers hold at least one in memory."""


@dataclass(frozen=True)
class PairRow:
    """One row; see the table of the module. Images are file bytes; ``scores`` maps a scorer to both scores."""

    caption: str
    jpg_0: bytes
    jpg_1: bytes
    label_0: float
    caption_0: str | None = None
    caption_1: str | None = None
    id: str | None = None
    margin: float | None = None
    score_0: float | None = None
    score_1: float | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seed_0: int | None = None
    seed_1: int | None = None
    model_0: str | None = None
    model_1: str | None = None
    difficulty: float | None = None
    user_id: str | None = None
    source: str | None = None

    @classmethod
    def of(cls, pair: Pair, **changes: Any) -> PairRow:
        """The row of a pair that was read, the chosen image first; ``changes`` are values of columns.

        Raises:
            BadImage: a picture is missing, unreadable or empty.
        """
        values: dict[str, Any] = {
            "caption": pair.prompt,
            "jpg_0": image_bytes(pair.chosen),
            "jpg_1": image_bytes(pair.rejected),
            "label_0": pair.label,
            "caption_0": pair.chosen_prompt,
            "caption_1": pair.rejected_prompt,
            "id": pair.id,
            "margin": pair.margin,
            "user_id": pair.user_id,
        }
        return cls(**(values | changes))

    def __post_init__(self) -> None:
        if not 0 <= self.label_0 <= 1:
            raise ValueError(f"label_0 is a probability, got {self.label_0!r}")

    def columns(self) -> dict[str, Any]:
        """The values by column."""
        row = {part.name: getattr(self, part.name) for part in fields(self)}
        row["label_1"] = 1 - self.label_0
        row["scores"] = json.dumps({k: list(v) for k, v in self.scores.items()}) if self.scores else None
        return row


_TEXTS = ("caption", "caption_0", "caption_1", "id", "scores", "model_0", "model_1", "user_id", "source")
_ORDER = (
    *("caption", "jpg_0", "jpg_1", "label_0", "label_1", "caption_0", "caption_1", "id", "margin", "score_0"),
    *("score_1", "scores", "seed_0", "seed_1", "model_0", "model_1", "difficulty", "user_id", "source"),
)
_ALWAYS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")


def write_pairs(path: Path, rows: Iterable[PairRow], *, overwrite: bool = False) -> int:
    """Write pairs as one parquet file, complete or not at all; equal rows give an equal file.

    Args:
        path: the file, ``<split>.parquet``; folders above it are made.
        rows: taken one after the other, so that a large set need not be in memory at once.
        overwrite: replace a file that is there.

    Returns:
        The number of pairs.

    Raises:
        UserError: the file exists, or there are no pairs.
    """
    import pyarrow.parquet as pq

    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another folder, or overwrite it with --overwrite_output_dir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    full, aside = path.with_name(f".{path.name}.full"), path.with_name(f".{path.name}.tmp")
    try:
        count, used = _write_all(full, rows)
        if not count:
            raise UserError(f"there is no pair to write to {path}.")
        names = [name for name in _ORDER if name in used or name in _ALWAYS]
        source = pq.ParquetFile(full)
        with pq.ParquetWriter(aside, _schema(names), compression="zstd") as writer:
            for group in range(source.num_row_groups):
                writer.write_table(source.read_row_group(group, columns=names).select(names))
        os.replace(aside, path)
    finally:
        full.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)
    return count


def _write_all(path: Path, rows: Iterable[PairRow]) -> tuple[int, set[str]]:
    """Write every column; returns the number of rows and the columns that have a value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, size, used = 0, 0, set[str]()
    schema = _schema(_ORDER)
    with pq.ParquetWriter(path, schema) as writer:
        waiting: list[dict[str, Any]] = []
        for row in rows:
            values = row.columns()
            used |= {name for name, value in values.items() if value is not None}
            waiting.append(values)
            count += 1
            size += len(row.jpg_0) + len(row.jpg_1)
            if size >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting, size = [], 0
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
    return count, used


def _schema(names: Iterable[str]) -> Any:
    import pyarrow as pa

    def kind(name: str) -> Any:
        if name in _TEXTS:
            return pa.string()
        if name.startswith("jpg_"):
            return pa.binary()
        return pa.int64() if name.startswith("seed_") else pa.float64()

    return pa.schema([(name, kind(name)) for name in names])


def image_bytes(image: EncodedImage | Image.Image) -> bytes:
    """The file of an image as it is stored; PNG where it is none yet.

    Raises:
        BadImage: it is missing, unreadable or empty.
    """
    if isinstance(image, EncodedImage):
        if not isinstance(image.data, Image.Image):
            return image.read()
        image = image.data
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
