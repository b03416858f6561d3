"""A comparison as one HTML page that needs no server and loads nothing from elsewhere.

The page carries its data as JSON, its style and its script, and allows itself nothing else: the policy in its head
names the hash of each. Texts of users reach the page only as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import logging
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.folder import write_atomically
from diffalign.evaluation.page import decimals_for

logger = logging.getLogger(__name__)

Placing = Literal["inside", "beside"]
UNCHANGED_BYTES = 256 * 1024
"""Images inside a page are put there as they are up to this size, larger ones as WebP of quality 90."""
_WARN_BYTES = 100 * 2**20
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass(frozen=True)
class PageCell:
    """An image file and its scores by scorer; None or a missing name where it has none."""

    image: Path
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class PageRow:
    """One prompt (and seed): an image of each model, None where there is none.

    ``note`` is small text below the prompt, such as the seed; ``category`` is what one can filter by.
    """

    prompt: str
    cells: Sequence[PageCell | None]
    note: str = ""
    category: str = ""


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        models: names of the columns.
        against: the place of the column that each is compared with; empty: the first.
        rows: of images.
        scorers: names and decimals; the first is shown at first. Higher is better.
        notes: small text under each model's name, one for each model, or none at all.
        title, footer: above the images, the second in small type.
        command: what made the page, to be copied.
    """

    models: Sequence[str]
    rows: Sequence[PageRow]
    scorers: Mapping[str, int]
    notes: Sequence[str] = ()
    title: str = "Comparison"
    footer: str = ""
    command: str = ""
    against: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.against and len(self.against) != len(self.models):
            raise UserError(f"{len(self.against)} places to compare with for {len(self.models)} models")
        if self.notes and len(self.notes) != len(self.models):
            raise UserError(f"{len(self.notes)} notes for {len(self.models)} models")
        for number, row in enumerate(self.rows):
            if len(row.cells) != len(self.models):
                raise UserError(f"row {number} has {len(row.cells)} images for {len(self.models)} models")


def page_of_rows(rows: Sequence[Mapping[str, Any]], root: Path, limit: int | None = None, **texts: Any) -> Page:
    """The page of a ``scores.jsonl``, as grids and evaluations write it: a column a model, a row a prompt and seed.

    Args:
        rows: of the file, each with ``prompt_index``, ``prompt``, ``seed``, ``model``, ``file``, ``scores``, and
            ``category`` where there are some.
        root: the folder that files are named from.
        limit: so many rows of the page, from the first.
        texts: ``notes``, ``title``, ``footer``, ``command`` and ``against`` of the page.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    scorers = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    cases: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["prompt_index"], row["seed"]), {})[row["model"]] = row
    shown = []
    for (_, seed), by_model in list(cases.items())[:limit]:
        first = next(iter(by_model.values()))
        cells = [
            PageCell(root / by_model[model]["file"], by_model[model]["scores"]) if model in by_model else None
            for model in models
        ]
        shown.append(PageRow(first["prompt"], cells, f"seed {seed}", first.get("category", "")))
    decimals = {name: decimals_for([[row["scores"].get(name) for row in rows]]) for name in scorers}
    return Page(models, shown, decimals, **texts)


def write_page(path: Path, page: Page, images: Placing = "inside") -> int:
    """Write a page, in one step.

    Args:
        path: the file; replaced.
        images: "inside", so that the page is one file to send; or "beside", as links to the files where they lie,
            relative to the page.

    Returns:
        Its size in bytes.

    Raises:
        UserError: an image is missing or cannot be read.
    """
    data = {
        "models": [
            {"name": name, "note": note, "against": against}
            for name, note, against in zip(
                page.models,
                page.notes or [""] * len(page.models),
                page.against or [0] * len(page.models),
                strict=True,
            )
        ],
        "scorers": [{"name": name, "decimals": decimals} for name, decimals in page.scorers.items()],
        "rows": [_row(row, list(page.scorers), path.parent, images) for row in page.rows],
        "command": page.command,
    }
    text = fill_template(page.title, page.footer, data)
    write_atomically(path, text)
    size = path.stat().st_size
    if size > _WARN_BYTES:
        logger.warning(
            "%s is %.0f MB, which browsers open slowly: --html beside links to the images, --html_rows shows fewer",
            path,
            size / 1e6,
        )
    return size


def fill_template(title: str, footer: str, data: Mapping[str, Any]) -> str:
    """The text of a page."""
    style, script = asset("base.css") + asset("grid.css"), asset("theme.js") + asset("grid.js")
    policy = (
        f"default-src 'none'; img-src data: file: 'self'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(title),
        "footer": html.escape(footer),
        "style": style,
        "script": script,
        "data": _script_json(data),
    }
    # Split before anything is put in: what is put in may itself hold braces.
    pieces = asset("grid.html").split("{{")
    rest = (piece.split("}}", 1) for piece in pieces[1:])
    return pieces[0] + "".join(parts[name] + after for name, after in rest)


@cache
def asset(name: str) -> str:
    """A file of ``diffalign/evaluation/web``."""
    return resources.files("diffalign.evaluation").joinpath("web", name).read_text(encoding="utf-8")


def _script_json(data: Mapping[str, Any]) -> str:
    """JSON that no text can end early: inside a script element only ``<`` could."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _row(row: PageRow, scorers: Sequence[str], root: Path, images: Placing) -> dict[str, Any]:
    cells = [None if cell is None else _cell(cell, scorers, root, images) for cell in row.cells]
    return {"prompt": row.prompt, "note": row.note, "category": row.category, "cells": cells}


def _cell(cell: PageCell, scorers: Sequence[str], root: Path, images: Placing) -> dict[str, Any]:
    try:
        with Image.open(cell.image) as image:
            (width, height), kind = image.size, image.format or ""
            source = _link(cell.image, root) if images == "beside" else _inline(cell.image, image, kind)
    except OSError as error:
        raise UserError(f"cannot show {cell.image}: {error}") from error
    scores = [_finite(cell.scores.get(name)) for name in scorers]
    return {"src": source, "width": width, "height": height, "scores": scores}


def _inline(path: Path, image: Image.Image, kind: str) -> str:
    content = path.read_bytes()
    if len(content) > UNCHANGED_BYTES or kind not in _TYPES:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "WEBP", quality=90)
        content, kind = buffer.getvalue(), "WEBP"
    return f"data:{_TYPES[kind]};base64,{base64.b64encode(content).decode()}"


def _link(path: Path, root: Path) -> str:
    return urllib.parse.quote(Path(os.path.relpath(path, root)).as_posix())


def _finite(score: float | None) -> float | None:
    return None if score is None or score != score or abs(score) == float("inf") else float(score)
