"""A folder remembers what its content was made with, and refuses to mix it with something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.folder import write_atomically


def hold_to(file: Path, settings: Mapping[str, Any], remedy: str, *, overwrite: bool = False) -> None:
    """Write ``settings`` as JSON to ``file``, unless others are there.

    Args:
        file: a .json file; folders above it are made.
        settings: values that JSON knows.
        remedy: what to do about a difference, for the error.
        overwrite: replace what is there.

    Raises:
        UserError: the file holds other settings; names them.
    """
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    if file.exists() and not overwrite:
        there = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in {**there, **plain} if there.get(key) != plain.get(key)]
        if changed:
            parts = "; ".join(f"{k} is {_short(there.get(k))} there, {_short(plain.get(k))} here" for k in changed)
            raise UserError(f"{file.parent} holds the work of another configuration: {parts}. {remedy}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
