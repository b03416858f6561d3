"""Prompts for validation, sampling and rollouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.shapes.scene import sample_captions

SHAPES_HELDOUT = "shapes-heldout"
"""The word for held-out captions of the bundled shapes world."""
SHAPES_TRAIN = "shapes-train"
"""The word for captions of its training split."""
_SHAPES_COUNT = {SHAPES_HELDOUT: 64, SHAPES_TRAIN: 1024}
SHAPES_TRAIN = "shapes-train"
"""The word for captions of its training split."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and whatever else its row holds (what a verifiable reward needs, for example)."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(source: str | Path | Sequence[str], *, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Read prompts, in order.

    Args:
        source: a text file with a prompt a line (blank lines are skipped); a JSONL file of ``{"prompt": ...}`` and
            metadata; a list of prompts; or "shapes-heldout": captions of the shapes world that no training split
            holds, drawn by ``seed``; or "shapes-train": captions of the training split.
        limit: read no more than this many; the words for the shapes world give 64 without it.
        seed: for the shapes world only.

    Raises:
        UserError: no such file, a line that is no prompt (file and line are named), no prompts, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{limit} prompts were asked for; ask for at least one.")
    if source in (SHAPES_HELDOUT, SHAPES_TRAIN):
        return [Prompt(text) for text in sample_captions(limit or 64, seed, heldout=source == SHAPES_HELDOUT)]
    if isinstance(source, (str, Path)):
        prompts = _read_file(Path(source).expanduser())
    else:
        prompts = [Prompt(text) for text in source]
    if not prompts:
        raise UserError(f"{source}: no prompts there. Write one a line.")
    return prompts[:limit]


def _read_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such prompt file. Give a text file with a prompt a line, a JSONL file of "
            f'{{"prompt": ...}}, or the word {SHAPES_HELDOUT} or {SHAPES_TRAIN}.'
        )
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
