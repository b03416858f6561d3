#!/usr/bin/env python
"""How long it takes until something can be done: imports and the command line.

    python benchmarks/startup.py --out benchmarks/results/startup.json

Each is a process of its own, the shortest of several, in turns; Python's own start is measured too, and every other is
also given in units of it, which hardly depend on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_record import about, add_record, table

STARTS = {
    "python": ["-c", "pass"],
    "import diffalign": ["-c", "import diffalign"],
    "diffalign --help": ["-m", "diffalign", "--help"],
    "diffalign recipes": ["-m", "diffalign", "recipes"],
    "diffalign train dpo --help": ["-m", "diffalign", "train", "dpo", "--help"],
    "import torch": ["-c", "import torch"],
    "import the trainer of dpo": ["-c", "from diffalign.trainers.dpo import DPOTrainer"],
}
TARGETS = {"import diffalign": 0.3, "diffalign --help": 0.7}
"""Seconds."""


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Shortest seconds of each start, and in units of Python's own."""
    best = dict.fromkeys(STARTS, float("inf"))
    for _ in range(rounds):
        for name, words in STARTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            best[name] = min(best[name], time.perf_counter() - start)
    return {
        name: {"seconds": round(seconds, 4), "of_python": round(seconds / best["python"], 3)}
        for name, seconds in best.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file that the record is added to")
    args = parser.parse_args()
    found = measure(args.rounds)
    record: dict[str, Any] = about(torch.device("cpu")) | {"rounds": args.rounds, "starts": found, "targets": TARGETS}
    rows = [[name, f"{row['seconds']:.3f} s", f"{row['of_python']:.2f}"] for name, row in found.items()]
    print(table(("start", "time", "of Python's own"), rows))
    if args.out:
        add_record(args.out, record)


if __name__ == "__main__":
    main()
