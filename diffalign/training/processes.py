"""Several processes that are one run: how long they wait for each other, and who is missing when that was in vain."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import InitProcessGroupKwargs

from diffalign.errors import DiffalignError
from diffalign.training.checkpoints import find_checkpoints

FOLDER = ".processes"
_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "timed out waiting",
    "wait timeout",
    "broken pipe",
    "gloo",
    "nccl",
    "collective operation timeout",
)
"""What the messages of torch.distributed have in common when another process is gone or late."""


def waiting(minutes: float) -> timedelta:
    """How long a process waits for the others in an exchange."""
    return timedelta(minutes=minutes)


def process_group(minutes: float) -> InitProcessGroupKwargs:
    """What accelerate is told about it."""
    return InitProcessGroupKwargs(timeout=waiting(minutes))


def lost_contact(error: BaseException) -> bool:
    """Whether an error is of an exchange between processes, not of the work between two exchanges."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


class Presence:
    """Where each process of a run is, in files that all of them see: what is left when one of them is gone.

    Args:
        output_dir: the run's folder.
        rank, count: this process, and their number; alone it writes nothing.
    """

    def __init__(self, output_dir: Path, rank: int, count: int) -> None:
        self.output_dir, self.rank, self.count = output_dir, rank, count
        self.folder = output_dir / FOLDER

    def note(self, step: int) -> None:
        """Say that this process begins a step."""
        if self.count == 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"step": step, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        aside = self.folder / f".{self.rank}.tmp"
        aside.write_text(json.dumps(row), encoding="utf-8")
        os.replace(aside, self._file(self.rank))

    def leave(self) -> None:
        """The run is over: nobody is missing."""
        if self.count > 1 and self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def error(self, cause: BaseException, step: int) -> DiffalignError:
        """What to say where the others were waited for in vain."""
        newest = [path.name for path in find_checkpoints(self.output_dir)][-1:]
        go_on = (
            f"Start all processes again with --resume_from_checkpoint latest: it goes on from {newest[0]}."
            if newest
            else "There is no checkpoint yet: start all processes again. A smaller checkpointing_steps loses less."
        )
        return DiffalignError(
            f"process {self.rank} of {self.count} lost contact with the others in step {step + 1} "
            f"({str(cause).strip().splitlines()[0]:.160}). {self._whereabouts()} Look at the end of that process's "
            f"own output: a crash, out of memory (then the kernel's log, too), a lost machine. If all were alive and "
            f"one was only slow, raise process_timeout. {go_on}"
        )

    def _whereabouts(self) -> str:
        """Which other process is behind, as far as the files tell."""
        rows = {rank: self._read(rank) for rank in range(self.count) if rank != self.rank}
        silent = [rank for rank, row in rows.items() if row is None]
        if silent:
            return f"Process {silent[0]} has not begun a step."
        last = min(rows, key=lambda rank: ((rows[rank] or {})["step"], (rows[rank] or {})["time"]))
        row = rows[last] or {}
        return (
            f"Last heard of is process {last} (pid {row['pid']} on {row['host']}), which began step {row['step'] + 1} "
            f"{time.time() - row['time']:.0f} s ago."
        )

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            row: dict[str, Any] = json.loads(self._file(rank).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return row

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"
