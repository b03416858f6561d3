"""Checkpoint folders: complete or absent, limited in number, found again.

A checkpoint is written aside and moved into place when it is whole, so whatever is called ``checkpoint-N`` can be
resumed from; a run that is killed in the middle of a save leaves a ``.checkpoint-N.*`` folder that nothing reads and
that the next save removes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffalign.errors import UserError

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def resolve_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The folder that ``resume_from_checkpoint`` means: "latest" (None if there is none yet) or a path.

    Raises:
        UserError: the path is not a complete checkpoint; names those there are.
    """
    found = find_checkpoints(output_dir)
    if wanted == "latest":
        return found[-1] if found else None
    for path in (Path(wanted), output_dir / wanted):
        if (path / STATE_FILE).is_file():
            return path
    names = ", ".join(path.name for path in found) or "none"
    raise UserError(
        f"resume_from_checkpoint: {wanted!r} is not a complete checkpoint (no {STATE_FILE} in it). "
        f"Complete checkpoints in {output_dir}: {names}. Use one of them, or 'latest'."
    )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The counters of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return state


@contextmanager
def space_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" into an error that says where, how much is free, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise UserError(
            f"no space left in {folder} ({free:.0f} MB free). Nothing that was complete has been touched. "
            "Free some space or set checkpoints_total_limit, then resume with --resume_from_checkpoint latest."
        ) from error


def save_checkpoint(
    output_dir: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], limit: int | None = None
) -> Path:
    """Write ``checkpoint-<step>``: ``write(folder)`` fills it, the state file is added, then it is moved into place.

    Args:
        output_dir: the run's folder.
        step: optimiser steps done.
        state: JSON-able counters.
        write: writes everything else into the folder it is given.
        limit: keep at most this many checkpoints, the newest.
    """
    for stale in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(stale)
    final = output_dir / f"checkpoint-{step}"
    with space_errors(output_dir):
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=output_dir))
        try:
            write(aside)
            (aside / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            for path in [*aside.rglob("*"), aside]:
                _flush(path)
            aside.chmod(0o755)
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)
            _flush(output_dir)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    if limit is not None:
        for old in find_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    return final


def _flush(path: Path) -> None:
    """Ask the disk to have it: a rename must not become durable before what it renames."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
