"""A folder of drawn images: which are there, which are not, and how they were made.

``settings.json`` says how every image of the folder was drawn; ``samples.jsonl`` has a row for each image of
``images/``. An image is written before its row, each in one step, so a run that was killed leaves nothing half-made:
what has no row is drawn again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import UserError

SETTINGS, ROWS, IMAGES = "settings.json", "samples.jsonl", "images"


@dataclass(frozen=True)
class Case:
    """One image to draw: a prompt, its place in the list, and a seed."""

    index: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        """Path of the image within the folder."""
        return f"{IMAGES}/{self.index:05d}-{self.seed}.png"


class SampleFolder:
    """Images of one model, drawn with one set of settings.

    Args:
        path: the folder; made by :meth:`prepare`.
        settings: plain values. A folder only ever holds images of equal settings.
        rank: of this process; each appends its rows to a file of its own until :meth:`finish`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.path, self.settings, self.rank = path, json.loads(json.dumps(settings)), rank
        self.rows: dict[str, dict[str, Any]] = {}

    def check(self, cases: Iterable[Case], *, overwrite: bool = False) -> None:
        """Refuse a folder that holds something else; reads only.

        Args:
            overwrite: accept drawn images of any kind, as they are about to go.

        Raises:
            UserError: its settings differ, or an image there is of another prompt; says how.
        """
        remedy = "Choose another --output_dir, or give --overwrite_output_dir to draw all anew."
        file = self.path / SETTINGS
        if not file.exists() and self.path.exists() and (not self.path.is_dir() or (self.path / IMAGES).exists()):
            raise UserError(f"{self.path} holds something else than drawn images. Choose another --output_dir.")
        if overwrite:
            return
        if file.exists():
            there = json.loads(file.read_text(encoding="utf-8"))
            keys = [key for key in {**there, **self.settings} if there.get(key) != self.settings.get(key)]
            if keys:
                changes = "; ".join(_difference(key, there.get(key), self.settings.get(key)) for key in keys)
                raise UserError(f"{self.path} holds images of another configuration: {changes}. {remedy}")
        rows = self._read()
        for case in cases:
            row = rows.get(case.file)
            if row is not None and row["prompt"] != case.prompt:
                raise UserError(
                    f"{self.path / case.file} was drawn for the prompt {row['prompt']!r}, not for {case.prompt!r}: "
                    f"the list of prompts has changed. {remedy}"
                )

    def prepare(self, *, overwrite: bool = False) -> None:
        """Make the folder, and rewrite its rows without any that are cut off or whose image is gone. One process."""
        if overwrite:
            for file in (SETTINGS, ROWS, *(part.name for part in self._parts())):
                (self.path / file).unlink(missing_ok=True)
            shutil.rmtree(self.path / IMAGES, ignore_errors=True)
        (self.path / IMAGES).mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / SETTINGS, json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")
        self._rewrite({file: row for file, row in self._read().items() if _readable(self.path / file)})

    def load(self) -> None:
        """Read which images are there; every process, after :meth:`prepare`."""
        self.rows = self._read()

    def add(self, case: Case, image: Image.Image, extra: Mapping[str, Any]) -> None:
        """Write an image, then its row."""
        target = self.path / case.file
        aside = target.with_suffix(f".{self.rank}.tmp")
        image.save(aside, format="PNG")
        os.replace(aside, target)
        row = {"file": case.file, "prompt_index": case.index, "prompt": case.prompt, "seed": case.seed, **extra}
        with self._part(self.rank).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[case.file] = row

    def finish(self) -> None:
        """Merge the rows of all processes into ``samples.jsonl``, in order. One process, when all are done."""
        self._rewrite(self._read())

    def image(self, case: Case) -> Image.Image:
        """The image of a case, RGB."""
        with Image.open(self.path / case.file) as image:
            return image.convert("RGB")

    def _part(self, rank: int) -> Path:
        return self.path / (ROWS if rank == 0 else f"samples.rank-{rank}.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("samples.rank-*.jsonl"))

    def _read(self) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for part in (self.path / ROWS, *self._parts()):
            if part.exists():
                rows.update((row["file"], row) for row in read_rows(part))
        return rows

    def _rewrite(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        ordered = sorted(rows.values(), key=lambda row: (row["prompt_index"], row["seed"]))
        write_rows(self.path / ROWS, ordered)
        for part in self._parts():
            part.unlink()
        for aside in (self.path / IMAGES).glob("*.tmp"):
            aside.unlink()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that was cut off while it was written is left out.

    Raises:
        UserError: another line is no JSON object.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path} line {number} is no JSON object: {line[:80]!r}") from error
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file in one step."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file aside and move it into place."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # Pillow's word for a broken PNG
        return False
    return True


def _difference(key: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        parts = [part for part in {**there, **here} if there.get(part) != here.get(part)]
        return f"{key} ({', '.join(parts)}) has other weights or scales"
    return f"{key} is {there!r} there, {here!r} here"
