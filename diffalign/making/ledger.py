"""What a long job has done so far, a line for each piece, so that a run that was stopped does nothing twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.evaluation.folder import read_rows, write_rows
from diffalign.making.settings import hold_to


class Ledger:
    """Finished pieces by key, in ``<name>.jsonl``, made with the settings in ``<name>.settings.json``.

    Args:
        folder: where both files lie; made by :meth:`open`.
        name: of the job.
        settings: plain values that decide what the pieces are.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.path, self._settings_path = folder / f"{name}.jsonl", folder / f"{name}.settings.json"
        self.settings = settings
        self._done: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def __len__(self) -> int:
        return len(self._done)

    def open(self, *, overwrite: bool = False) -> None:
        """Read what is there; with ``overwrite`` it goes.

        Raises:
            UserError: what is there was made with other settings; names them.
        """
        if overwrite:
            self.path.unlink(missing_ok=True)
        remedy = "Choose another --output_dir, or give --overwrite_output_dir to begin anew."
        hold_to(self._settings_path, self.settings, remedy, overwrite=overwrite)
        rows = read_rows(self.path) if self.path.exists() else []
        self._done = {row["key"]: row["value"] for row in rows}
        # A line that a kill cut off would run into the next one.
        write_rows(self.path, rows)

    def add(self, key: str, value: Any) -> None:
        """Note a finished piece; ``value`` is of JSON types."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
        self._done[key] = value
