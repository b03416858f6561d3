"""What a benchmark writes down beside its numbers, and the file that keeps every record."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
ROOT = Path(__file__).parent.parent


def about(device: torch.device) -> dict[str, Any]:
    """When, on what, with which versions and by which command."""
    import torch

    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def commit() -> str:
    """The commit that was measured; "+" where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def add_record(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a JSON list, complete or not at all; earlier ones stay."""
    records = json.loads(path.read_text()) if path.exists() else []
    records = records if isinstance(records, list) else [records]
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps([*records, record], indent=1) + "\n")
    os.replace(aside, path)


def last(results: Any) -> dict[str, Any]:
    """The last record of a file, which may hold one alone."""
    return results[-1] if isinstance(results, list) else results


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
