#!/usr/bin/env python
"""Has anything become slower? ``make bench``: measures again and compares with the last stored results, as ratios.

    python benchmarks/guard.py
    python benchmarks/guard.py --only startup step_time

Only ratios are compared (a loop over a bare loop, a method over Diffusion-DPO, an import over Python's own start, ours
over the plain loop), so another machine than the stored results' will do; what was stored for a card is compared on
that card alone. Ends with 1 where something is slower than stored by more than its tolerance, or above its bound. To
store what was measured, run the benchmark itself with ``--out``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_record import last, table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
Figures = dict[str, float]
LOOPS = ("dpo", "awm")
"""Methods whose steps are timed against a bare loop."""


@dataclass(frozen=True)
class Guard:
    """A benchmark that is run again.

    Attributes:
        command: script and arguments, without ``--out``.
        figures: from a result file to ratios by name, smaller being better; empty where it holds none to compare with.
        stored: result file.
        tolerance: by how much a ratio may grow, as a share of it.
        bounds: what ratios may never exceed, by name.
    """

    command: Sequence[str]
    figures: Callable[[Any], Figures]
    stored: str
    tolerance: float
    bounds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One ratio, now and as stored (None where it is not)."""

    name: str
    now: float
    stored: float | None
    slower: bool


def compare(now: Figures, stored: Figures, tolerance: float, bounds: Mapping[str, float]) -> list[Finding]:
    """Every ratio that was measured, and whether it has become worse than it may."""
    findings = []
    for name, value in now.items():
        before = stored.get(name)
        grown = before is not None and value > before * (1 + tolerance)
        findings.append(Finding(name, value, before, grown or value > bounds.get(name, float("inf"))))
    return findings


def loop_over_bare(result: Any) -> Figures:
    """Of ``step_time.py``."""
    methods = last(result)["methods"]
    return {f"loop over a bare loop, {name}": row["ratio_of_turns_median"] for name, row in methods.items()}


def over_dpo(result: Any) -> Figures:
    """Of ``method_steps.py``."""
    return {f"{name} over dpo": row["ratio"] for name, row in result["methods"].items() if name != "dpo"}


def over_python(records: Any) -> Figures:
    """Of ``startup.py``."""
    starts = records[-1]["starts"]
    light = ("import diffalign", "diffalign --help", "diffalign recipes")
    found = {f"{name} over python": starts[name]["of_python"] for name in light}
    heavy = "import the trainer of dpo"
    return found | {f"{heavy} over torch": starts[heavy]["seconds"] / starts["import torch"]["seconds"]}


def over_plain(model: str, card: str) -> Callable[[Any], Figures]:
    """Of ``sdxl_step.py``: time and memory of a pair, ours over the plain loop's, and methods over Diffusion-DPO."""

    def figures(records: Any) -> Figures:
        fitting = [record for record in records if (record["model"], record["card"]) == (model, card)]
        found: Figures = {}
        for record in fitting:  # A later record replaces the same rows of an earlier one.
            found |= _of_rows(record["rows"])
        return found

    return figures


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> Figures:
    axes = ("resolution", "batch_size", "rank", "checkpointing", "mode")
    sound = [row for row in rows if "out_of_memory" not in row]
    dpo = {tuple(row[axis] for axis in axes): row for row in sound if row["method"] == "dpo"}
    found: Figures = {}
    for row in sound:
        place = tuple(row[axis] for axis in axes)
        name = f"{row['method']} {' '.join(map(str, place))}"
        if row.get("ratio_to_plain"):
            found[f"{name}: time over the plain loop"] = 1 / row["ratio_to_plain"]
        if row["method"] != "dpo" and place in dpo:
            found[f"{name}: time over dpo"] = dpo[place]["samples_per_second"] / row["samples_per_second"]
            found[f"{name}: memory over dpo"] = row["peak_gb"] / dpo[place]["peak_gb"]
    return found


def guards() -> dict[str, Guard]:
    """What is run on this machine."""
    found = {
        "startup": Guard(["startup.py"], over_python, "startup.json", 0.25),
        "step_time": Guard(
            ["step_time.py", "--methods", *LOOPS, "--steps", "30"],
            loop_over_bare,
            "step_time.json",
            0.03,
            {f"loop over a bare loop, {name}": 1.05 for name in LOOPS},
        ),
        "method_steps": Guard(
            ["method_steps.py", "--methods", "mapo", "sft", "kto", "--rounds", "10"],
            over_dpo,
            "method_steps.json",
            0.1,
        ),
        "shapes_step": Guard(
            ["sdxl_step.py", "--model", "shapes-sdxl", "--device", "cpu", "--precision", "no", "--resolutions", "64"]
            + ["--batch_sizes", "8", "--methods", "dpo", "mapo"],
            over_plain("shapes-sdxl", "CPU"),
            "sdxl_step.json",
            0.15,
        ),
    }
    if torch.cuda.is_available():
        found["sdxl_step"] = Guard(
            ["sdxl_step.py", "--methods", "dpo", "mapo", "--checkpointing", "none", "full"],
            over_plain("sdxl", torch.cuda.get_device_name()),
            "sdxl_step.json",
            0.1,
        )
    return found


def measure(guard: Guard) -> list[Finding]:
    """Run a benchmark and compare."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        script, *arguments = guard.command
        subprocess.run([sys.executable, str(HERE / script), *arguments, "--out", str(out)], check=True)
        now = guard.figures(json.loads(out.read_text()))
    path = RESULTS / guard.stored
    stored = guard.figures(json.loads(path.read_text())) if path.exists() else {}
    return compare(now, stored, guard.tolerance, guard.bounds)


def main() -> int:
    known = guards()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(known), default=list(known))
    args = parser.parse_args()
    findings = [finding for name in args.only for finding in measure(known[name])]
    words = {True: "SLOWER", False: "ok"}
    rows = [
        [f.name, f"{f.now:.3f}", f"{f.stored:.3f}" if f.stored else "not stored", words[f.slower]] for f in findings
    ]
    print(table(("ratio", "now", "stored", ""), rows))
    slower = [f.name for f in findings if f.slower]
    print(f"slower than stored: {', '.join(slower)}" if slower else "nothing is slower than stored")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
