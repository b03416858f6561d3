"""Processes tell each other what they did, through files.

Caching takes as long as it takes, longer than the time-out of a collective operation; so the processes of a run wait
for each other's files, and meet at a barrier only where nobody is late.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.data.shards import digest, write_atomically
from diffalign.errors import UserError

_POLL_SECONDS = 0.05


class Exchange:
    """The processes of one run.

    Args:
        folder: a folder that all processes see.
        rank, world_size: this process, and their number.
        barrier: returns once all processes have called it (``PartialState().wait_for_everyone``).

    Raises:
        UserError: ``folder`` is not shared.
    """

    def __init__(
        self,
        folder: Path | None = None,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] | None = None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        if world_size == 1:
            return
        if folder is None or barrier is None:
            raise ValueError("several processes need a folder and a barrier")
        self._barrier = barrier
        # Two launches at once that share a cache have different addresses.
        run = digest(os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))
        token = folder / f"{run}.token"
        if rank == 0:
            write_atomically(token, uuid.uuid4().hex.encode())
        barrier()
        if not token.is_file():
            raise UserError(f"process {rank} does not see {token}. Choose a cache_dir that all processes share.")
        self._folder = folder / token.read_text()
        barrier()

    def share(self, name: str, payload: Any) -> list[Any]:
        """Give ``payload`` (of JSON types) to all, and return what every process gave, by rank.

        Waits until all have called it, however long that takes. A ``name`` is used once.
        """
        if self.world_size == 1:
            return [payload]
        write_atomically(self._folder / f"{name}-{self.rank}.json", json.dumps(payload).encode())
        paths = [self._folder / f"{name}-{rank}.json" for rank in range(self.world_size)]
        while not all(path.is_file() for path in paths):
            time.sleep(_POLL_SECONDS)
        return [json.loads(path.read_text()) for path in paths]

    def close(self) -> None:
        """Remove the files, once all are done."""
        if self.world_size > 1:
            self._barrier()
            if self.rank == 0:
                shutil.rmtree(self._folder)
