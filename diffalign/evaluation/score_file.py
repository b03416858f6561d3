"""A file of scores, a row an image: appended to while images are scored, so that a killed run scores nothing twice."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.config import write_text
from diffalign.errors import UserError
from diffalign.evaluation.folder import read_rows, write_rows
from diffalign.evaluation.listing import ListedImage

Row = dict[str, Any]


class ScoreFile:
    """Scores of images by name of the reward, with the identity of each scorer.

    A row is ``{"file", "prompt", "digest", "scores": {name: score or null}, "scorers": {name: identity}, "errors":
    {name: why}}``; ``errors`` only where there are some. While images are scored, a row that comes later wins.

    Args:
        path: ``.jsonl``, or ``.csv`` for a table as well: its rows are kept in the ``.jsonl`` beside it.

    Raises:
        UserError: another ending, or a folder that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix not in (".jsonl", ".csv"):
            raise UserError(f"scores are written to .jsonl or .csv, not to {str(path)!r}")
        if not self.path.parent.is_dir():
            raise UserError(f"the folder {self.path.parent} for the scores does not exist")
        self.record = self.path.with_suffix(".jsonl")
        self.rows: dict[str, Row] = {}

    def open(self, files: Iterable[str], identities: Mapping[str, str], *, overwrite: bool = False) -> None:
        """Read what is there, and leave out what a kill cut off.

        Args:
            files: of the images to be scored; what is there must be of these.
            identities: of the scorers by name; what is there must be of these, and may be of others.
            overwrite: begin anew.

        Raises:
            UserError: what is there is something else; says what.
        """
        remedy = "Choose another --out, or give --overwrite to score all anew."
        if not overwrite and self.path != self.record and self.path.exists() and not self.record.exists():
            raise UserError(f"{self.path} exists, without the {self.record.name} that a table of scores has. {remedy}")
        if overwrite or not self.record.exists():
            write_rows(self.record, [])
            return
        rows = read_rows(self.record)
        for row in rows:
            if not isinstance(row.get("file"), str) or not isinstance(row.get("scores"), dict):
                raise UserError(f"{self.record} holds something else than scores of images. {remedy}")
            for name, identity in row.get("scorers", {}).items():
                now = identities.get(name, identity)
                if now != identity:
                    raise UserError(
                        f"{self.record} holds scores of {name} by {identity}, which is now {now}. {remedy}"
                    )
        strange = sorted({row["file"] for row in rows} - set(files))
        if strange:
            raise UserError(
                f"{self.record} holds scores of {len(strange)} images that are not among those given, such as "
                f"{strange[0]}. {remedy}"
            )
        self.rows = {row["file"]: row for row in rows}
        write_rows(self.record, rows)

    def known(self, image: ListedImage, digest: str, name: str) -> bool:
        """Whether an image of this content and prompt has a score of this name."""
        row = self.rows.get(image.file)
        same = row is not None and row.get("digest") == digest and row.get("prompt") == image.prompt
        return same and row is not None and row["scores"].get(name) is not None

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows in one write."""
        with self.record.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.update((row["file"], row) for row in rows)

    def finish(self, files: Sequence[str]) -> None:
        """Write the rows of ``files`` in this order, and the table if there is to be one."""
        rows = [self.rows[file] for file in files]
        write_rows(self.record, rows)
        if self.path == self.record:
            return
        names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["file", "prompt", *names, "error"])
        for row in rows:
            errors = "; ".join(f"{name}: {why}" for name, why in row.get("errors", {}).items())
            writer.writerow([row["file"], row["prompt"], *(row["scores"].get(name) for name in names), errors])
        write_text(self.path, table.getvalue())


def plain(score: float) -> float:
    """A float32 score with no more digits than tell it from others."""
    return float(str(np.float32(score)))
