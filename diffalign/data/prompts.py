"""Prompts for validation, sampling and rollouts: from files, data sets, functions and the shapes world."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, did_you_mean
from diffalign.imports import find_callable, is_import_path
from diffalign.shapes.scene import sample_captions, validation_captions

SHAPES_HELDOUT = "shapes-heldout"
"""The word for held-out captions of the bundled shapes world."""
SHAPES_TRAIN = "shapes-train"
"""The word for captions of its training split."""
SHAPES_VALIDATION = "shapes-validation"
"""The word for held-out captions that no result is reported on: to choose a checkpoint by, and when to stop."""
_SHAPES: Mapping[str, tuple[int, Callable[[int, int], list[str]]]] = {
    SHAPES_HELDOUT: (64, partial(sample_captions, heldout=True)),
    SHAPES_TRAIN: (1024, sample_captions),
    SHAPES_VALIDATION: (64, validation_captions),
}
"""How many captions, unless said otherwise, and where they come from."""

_HUB = "hub:"
_TABLES = (".parquet", ".arrow")
_COLUMNS = ("prompt", "caption", "text")
_FORMS = (
    'Give a text file with a prompt a line, a JSONL file of {"prompt": ...}, a parquet file or a folder of them with '
    "a column (prompts.parquet:COLUMN), hub:NAME:COLUMN, package.module:function, path/to/file.py:function, or the "
    f"word {SHAPES_HELDOUT}, {SHAPES_VALIDATION}, {SHAPES_TRAIN} or diffalign-small; or a published set as "
    "partiprompts:PLACE (also hpsv2, drawbench, pickapic, geneval, t2i-compbench)."
)


@dataclass(frozen=True)
class Prompt:
    """A prompt and whatever else its row holds (what a verifiable reward needs, for example)."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(source: str | Path | Sequence[str], *, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Read prompts, in order.

    Args:
        source: one of

            - a text file with a prompt a line (blank lines are skipped);
            - a JSONL file of ``{"prompt": ...}``; what else a line holds is metadata;
            - ``prompts.parquet:COLUMN``, also an arrow file or a folder that readers of training data know; without
              a column, the first of prompt, caption and text that is there. The other columns are metadata, pictures
              left out;
            - ``hub:NAME:COLUMN``, or ``hub:NAME@SPLIT:COLUMN`` for another split than train: a data set of the hub;
            - ``package.module:function`` or ``path/to/file.py:function``: a function without arguments that returns
              (or yields) prompts, or pairs of a prompt and its metadata;
            - "diffalign-small" or ``WORD:PLACE``, a published set, see :mod:`diffalign.data.prompt_sets`; a limit then
              takes evenly from its categories;
            - a list of prompts;
            - "shapes-heldout": captions of the shapes world that no training split holds, drawn by ``seed``;
              "shapes-validation": the same without those that results are reported on, to choose by;
              "shapes-train": captions of the training split.
        limit: read no more than this many; without it "shapes-train" gives 1024 and the other two 64.
        seed: for the shapes world only.

    Raises:
        UserError: no such file, column or function, a line that is no prompt (file and line are named), no prompts, or
            a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{limit} prompts were asked for; ask for at least one.")
    if isinstance(source, str) and source in _SHAPES:
        count, draw = _SHAPES[source]
        return [Prompt(text) for text in draw(limit or count, seed)]
    if isinstance(source, str) and _is_prompt_set(source):
        return _read_set(source, limit)
    if isinstance(source, (str, Path)):
        prompts = list(islice(_open(str(source)), limit))
    else:
        prompts = [Prompt(text) for text in source][:limit]
    if not prompts:
        raise UserError(f"{source}: no prompts there. Write one a line.")
    return prompts


def _is_prompt_set(source: str) -> bool:
    from diffalign.data.prompt_sets import is_prompt_set

    return is_prompt_set(source) and not Path(source).exists()


def _read_set(source: str, limit: int | None) -> list[Prompt]:
    from diffalign.data.prompt_sets import read_prompt_set, spread

    return spread(read_prompt_set(source), limit)


def _open(source: str) -> Iterable[Prompt]:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in _TABLES:
        return _read_file(path)
    if source.startswith(_HUB):
        place, _, column = source.removeprefix(_HUB).partition(":")
        name, _, split = place.partition("@")
        return _read_table(name, split or "train", column)
    if path.exists():
        return _read_table(source, "train", "")
    place, _, column = source.rpartition(":")
    if place and Path(place).expanduser().exists() and not place.endswith(".py"):
        return _read_table(place, "train", column)
    if is_import_path(source):
        return _call(source)
    raise UserError(f"{source}: no such prompt file. {_FORMS}")


def _read_file(path: Path) -> list[Prompt]:
    numbered = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if path.suffix in (".jsonl", ".json"):
        return [_parse(line, f"{path} line {number}") for number, line in lines]
    return [Prompt(line.strip()) for _, line in lines]


def _parse(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error}). Write one object a line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where}: no prompt. Expected {{"prompt": "...", ...}}.')
    return Prompt(row.pop("prompt"), row)


def _read_table(place: str, split: str, column: str) -> Iterable[Prompt]:
    """Prompts of a column of a table; the other columns that are no pictures are their metadata."""
    from diffalign.data.layouts import open_table
    from diffalign.data.tables import StreamTable

    table = open_table(place, split=split, streaming=False)
    assert not isinstance(table, StreamTable)
    found = table.columns
    chosen = column or next((name for name in _COLUMNS if name in found), "")
    if chosen not in found:
        wanted = repr(column) if column else f"any of {', '.join(_COLUMNS)}"
        raise UserError(
            f"{place}: there is no column {wanted}.{did_you_mean(column, found)} Columns found: "
            f"{', '.join(found) or 'none'}. Name it after a colon: {place}:{(found or ['COLUMN'])[0]}."
        )
    for index, row in enumerate(table.scan([chosen, *(name for name in table.plain if name != chosen)])):
        text = row.get(chosen)
        if not isinstance(text, str):
            raise UserError(f"{table.where(index)}: {chosen} is {text!r}, not a prompt. Choose a column of texts.")
        yield Prompt(text, {name: value for name, value in row.items() if name != chosen})


def _call(source: str) -> Iterable[Prompt]:
    """Prompts of a function, checked one by one."""
    made = find_callable(source, "prompt function")()
    if isinstance(made, str | Mapping) or not isinstance(made, Iterable):
        raise UserError(f"{source} returned a {type(made).__name__}; a prompt function returns a list of prompts")
    for index, item in enumerate(made):
        yield _as_prompt(item, f"{source}: item {index}")


def _as_prompt(item: Any, where: str) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt(item)
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Mapping):
        return Prompt(item[0], dict(item[1]))
    raise UserError(f"{where} is {item!r:.100}: give a prompt, or a pair of a prompt and a mapping of its metadata")
