"""The journal of votes: append-only JSONL, on disk before anyone is told that a vote counts.

A row is ``{"time", "annotator", "item", "vote", "left"}``: ``vote`` is first, second, tie, skip or undo, in the pair's
own order whatever side an image was shown on; ``left`` says which image stood on the left. The last row of an
annotator and an item counts.
"""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffalign.errors import UserError

FILE = "votes.jsonl"
VOTES = ("first", "second", "tie", "skip")


class Journal:
    """Votes by annotator and item, in the order they were cast. One process at a time; any number of its threads.

    Args:
        folder: made if it is not there.

    Raises:
        UserError: another process has it open, or a row is none of ours.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.votes: dict[str, dict[str, str]] = {}
        self._mutex = threading.Lock()
        self._lock = FileLock(folder / f".{FILE}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{folder} is in use by another diffalign label. Use its page, or stop it first."
            ) from error
        try:
            self._load()
            self._stream = self.path.open("ab")
        except BaseException:
            self._lock.release()
            raise

    def _load(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                self._apply(row["annotator"], row["item"], row["vote"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.path} line {number} is no vote: {line[:80]!r}. Correct or remove it."
                ) from error
        if whole != content:
            # What a kill cut off was never answered: the page sends it again.
            os.truncate(self.path, len(whole))

    def add(self, annotator: str, item: str, vote: str, left: str | None = None) -> None:
        """Write a vote, or "undo", to disk; it counts when this returns. One that stands already is not repeated.

        Raises:
            OSError: it could not be written; the journal is as it was.
        """
        with self._mutex:
            standing = self.votes.get(annotator, {}).get(item)
            if vote == (standing or "undo"):
                return
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            row: dict[str, Any] = {"time": time, "annotator": annotator, "item": item, "vote": vote}
            if left is not None:
                row["left"] = left
            size = self.path.stat().st_size
            try:
                self._stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                self._stream.flush()
                os.fsync(self._stream.fileno())
            except OSError:
                os.truncate(self.path, size)
                raise
            self._apply(annotator, item, vote)

    def _apply(self, annotator: str, item: str, vote: str) -> None:
        if vote not in (*VOTES, "undo"):
            raise ValueError(f"{vote!r} is no vote")
        own = self.votes.setdefault(annotator, {})
        own.pop(item, None)  # a vote that was changed is the latest
        if vote != "undo":
            own[item] = vote

    def close(self) -> None:
        """Let others open it."""
        self._stream.close()
        self._lock.release()
