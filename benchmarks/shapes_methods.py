#!/usr/bin/env python
"""Does each method move what it promises to move? On the shapes world, held-out prompts, same seeds, several runs.

    python benchmarks/shapes_methods.py --methods dpo --seeds 0 1 2 --out benchmarks/results/shapes_methods.json

Trains every method with its recipe ``shapes-<method>`` and every seed, in a process of its own, draws the held-out
prompts with the base model and with the result, and adds one record to the file. A record that is there is kept and
its run not repeated; ``--again`` repeats it. ``python benchmarks/render_results.py`` makes docs/results.md of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.app import console
from diffalign.config import load_yaml
from diffalign.evaluation.shapes import GUIDANCE, STEPS, Judgement, compare, draw, heldout_prompts, judge
from diffalign.trainers import load_method

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the records are added to")
    parser.add_argument("--images", type=int, default=1024, help="held-out prompts, one image each and model")
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes_methods"), help="folder of the training runs")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a record")
    args = parser.parse_args()

    records: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    todo = [(method, seed) for method in args.methods for seed in args.seeds]
    have = {(record["method"], record["seed"]) for record in records}
    prompts = heldout_prompts(args.images)
    base: Judgement | None = None
    console.set_up()
    for method, seed in todo:
        if (method, seed) in have and not args.again:
            print(f"{method} seed {seed}: has a record")
            continue
        if base is None:
            base = judge(draw(prompts, progress="base"), prompts)
        record = measure(method, seed, args.runs / f"{method}-{seed}", prompts, base)
        records = [r for r in records if (r["method"], r["seed"]) != (method, seed)] + [record]
        write(args.out, records)
        print(json.dumps({k: record[k] for k in ("method", "seed", "checker_score", "win_rate_annotator")}))


def measure(method: str, seed: int, run: Path, prompts: list[str], base: Judgement) -> dict[str, Any]:
    """Train one method with one seed, draw, judge; returns the record."""
    command = [sys.executable, "-m", "diffalign", "train", method, "--config", f"shapes-{method}"]
    command += ["--seed", str(seed), "--output_dir", str(run), "--overwrite_output_dir"]
    start = time.monotonic()
    # wait4 tells of this process alone; getrusage would give the largest of all that ran before.
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
    seconds = time.monotonic() - start
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    aligned = judge(draw(prompts, lora=run, progress=f"{method} {seed}"), prompts)
    rates = compare(aligned, base)
    return {
        "method": method,
        "seed": seed,
        "images": len(prompts),
        "sampling": f"{STEPS} steps, guidance {GUIDANCE:g}",
        "base_checker_score": round(float(base.checker.mean()), 4),
        "checker_score": round(float(aligned.checker.mean()), 4),
        "base_annotator_utility": round(float(base.annotator.mean()), 4),
        "annotator_utility": round(float(aligned.annotator.mean()), 4),
        **{f"win_rate_{judge_}": [round(x, 4) for x in (r.rate, r.low, r.high)] for judge_, r in rates.items()},
        "steps": len(rows),
        "policy_forward_passes": policy_forward_passes(method, run, len(rows)),
        "train_seconds": round(seconds, 1),
        "step_seconds": round(float(np.median([row["step_seconds"] for row in rows])), 4),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "implicit_accuracy": round(float(np.mean([row["implicit_accuracy"] for row in rows[-50:]])), 4)
        if "implicit_accuracy" in rows[-1]
        else None,
        "command": "diffalign " + " ".join(command[3:]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }


def policy_forward_passes(method: str, run: Path, steps: int) -> int:
    """Images that went through the policy in training: the budget that methods are compared at."""
    config = load_yaml(run / "config.yaml")
    batch = config["train_batch_size"] * config["gradient_accumulation_steps"]
    return int(steps * batch * load_method(method)[1].needs.policy_passes)


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write the records sorted; the file is complete or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(sorted(records, key=lambda r: (r["method"], r["seed"])), indent=1) + "\n")
    os.replace(aside, path)


if __name__ == "__main__":
    main()
