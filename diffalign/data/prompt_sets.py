"""The prompt sets that models are compared on, from their published files, with their categories.

| word | published as | category |
|---|---|---|
| ``partiprompts`` | PartiPrompts.tsv: Prompt, Category, Challenge, Note | Category |
| ``hpsv2`` | anime.json, concept-art.json, paintings.json, photo.json: lists of prompts | the file |
| ``drawbench`` | CSV: Prompts, Category | Category |
| ``pickapic`` | parquet files with a caption, such as validation_unique | none |
| ``geneval`` | evaluation_metadata.jsonl: prompt, tag, include | tag |
| ``t2i-compbench`` | color_val.txt, shape_val.txt, ...: a prompt a line | the file |

Each is written ``WORD:PLACE``, where the place is the file, a folder that holds it, or a data set of the hub
(``owner/name``). Two need no place: ``diffalign-small``, and ``shapes-heldout`` of :mod:`diffalign.data.prompts`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.prompts import Prompt
from diffalign.data.small_prompts import small_prompts
from diffalign.errors import UserError

SMALL = "diffalign-small"
CATEGORY = "category"
"""Key of a prompt's metadata."""

_COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
_HPS_STYLES = ("anime", "concept-art", "paintings", "photo")

Rows = Iterator[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Layout:
    """How a set is published.

    Attributes:
        files: patterns of its files, in the order in which they are read; of a hub data set only these are fetched.
        every: all of the files make the set; otherwise the first pattern that there is.
        read: file -> prompts and what else is known of them.
    """

    files: tuple[str, ...]
    every: bool
    read: Callable[[Path], Rows]


def is_prompt_set(source: str) -> bool:
    """Whether a source of prompts is the word of a set, or begins with one and a colon."""
    word, colon, _ = source.partition(":")
    return source == SMALL or (bool(colon) and word in LAYOUTS)


def read_prompt_set(source: str) -> list[Prompt]:
    """All prompts of a set, in the order of its files, with "category" among their metadata where the set has some.

    Args:
        source: "diffalign-small" or ``WORD:PLACE``, see the top of this module.

    Raises:
        UserError: no such place or file, or a row without a prompt; names the file and row.
    """
    if source == SMALL:
        return [Prompt(text, {CATEGORY: category}) for text, category in small_prompts()]
    word, _, place = source.partition(":")
    layout = LAYOUTS[word]
    prompts = [Prompt(text, dict(row)) for file in _files(word, place, layout) for text, row in layout.read(file)]
    if not prompts:
        raise UserError(f"{source}: the files hold no prompts")
    return prompts


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first prompts of every category, in turn, ``limit`` in all and in their order: not all of one category."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    rank: dict[Any, int] = {}
    turns = []
    for index, prompt in enumerate(prompts):
        category = prompt.metadata.get(CATEGORY)
        rank[category] = rank.get(category, -1) + 1
        turns.append((rank[category], index))
    return [prompts[index] for index in sorted(index for _, index in sorted(turns)[:limit])]


def _files(word: str, place: str, layout: Layout) -> list[Path]:
    path = Path(place).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = _fetch(word, place, layout)
    found = [sorted(path.rglob(pattern)) for pattern in layout.files]
    missing = [pattern for pattern, files in zip(layout.files, found, strict=True) if not files]
    if len(missing) == len(found) or (layout.every and missing):
        raise UserError(f"{word}: {place} lacks {', '.join(missing)}. Give the folder of the published files.")
    if layout.every:
        return [files[0] for files in found]
    return next(files for files in found if files)


def _fetch(word: str, place: str, layout: Layout) -> Path:
    """The set's files of a hub data set."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if place.count("/") != 1 or place.startswith((".", "/", "~")):
        raise UserError(f"{word}: there is nothing at {place!r}. Give a file, a folder, or a hub id 'owner/name'.")
    try:
        patterns = [f"*{pattern}" for pattern in layout.files]
        return Path(snapshot_download(place, repo_type="dataset", allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{word}: {place!r} is no file or folder here, and cannot be fetched from the hub: {error}"
        ) from error


def _table(path: Path) -> Rows:
    """Rows of a TSV, CSV or parquet file with a column Prompt (or Prompts) and others, of any case."""
    for number, row in enumerate(_table_rows(path), 1):
        known = {str(key).strip().lower(): value for key, value in row.items() if key is not None}
        text = next((known.pop(key) for key in ("prompt", "prompts") if isinstance(known.get(key), str)), "").strip()
        if not text:
            raise UserError(f"{path} row {number}: no prompt. Columns: {', '.join(known) or 'none'}.")
        yield text, {key: value for key, value in known.items() if value not in (None, "")}


def _table_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        return _parquet(path, None)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        tabs = path.suffix == ".tsv"
        # PartiPrompts holds lone quotation marks, so that those of a TSV are letters like others.
        reader = csv.DictReader(
            stream, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        )
        return list(reader)


def _parquet(path: Path, columns: list[str] | None) -> list[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_table(path, columns=columns).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {error}") from error


def _style(path: Path) -> Rows:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{path}: expected a list of prompts")
    yield from ((prompt, {CATEGORY: path.stem}) for prompt in prompts)


def _captions(path: Path) -> Rows:
    """Each caption once: a row of Pick-a-Pic is a pair, and many pairs have one caption."""
    rows = _parquet(path, ["caption"])
    if rows and "caption" not in rows[0]:
        raise UserError(f"{path}: there is no column caption")
    yield from ((str(text), {}) for text in dict.fromkeys(row["caption"] for row in rows) if text)


def _metadata(path: Path) -> Rows:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = dict(json.loads(line))
            yield str(row.pop("prompt")), {**row, CATEGORY: row["tag"]}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number}: expected an object with prompt and tag, got {line[:80]!r}") from (
                error
            )


def _lines(path: Path) -> Rows:
    category = path.stem.removesuffix("_val")
    lines = path.read_text(encoding="utf-8").splitlines()
    yield from ((line.strip(), {CATEGORY: category}) for line in lines if line.strip())


LAYOUTS: dict[str, Layout] = {
    "partiprompts": Layout(("PartiPrompts.tsv", "*.tsv", "*.parquet"), False, _table),
    "hpsv2": Layout(tuple(f"{style}.json" for style in _HPS_STYLES), True, _style),
    "drawbench": Layout(("*.csv", "*.tsv", "*.parquet"), False, _table),
    "pickapic": Layout(("*validation_unique*.parquet", "*validation*.parquet", "*.parquet"), False, _captions),
    "geneval": Layout(("evaluation_metadata.jsonl", "*.jsonl"), False, _metadata),
    "t2i-compbench": Layout(tuple(f"{category}_val.txt" for category in _COMPBENCH), True, _lines),
}
"""Layouts by the word that names them."""
