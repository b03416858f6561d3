#!/usr/bin/env python
"""What a training step of each method costs beside one of Diffusion-DPO, at an equal number of images a step.

    python benchmarks/method_steps.py --out benchmarks/results/method_steps.json

Every method runs with its recipe ``shapes-<method>``. A round takes one step of each, so all meet the same machine;
what is reported is the median over rounds of a method's step over DPO's of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.config import from_dict, load_yaml
from diffalign.recipes import find
from diffalign.trainers import load_method

BASELINE = "dpo"
METHODS = ("mapo", "dcpo", "sft", "kto", "cpo", "orpo", "hinge", "ipo", "robust", "sdpo", "dmpo", "bdpo", "dspo")


def make(name: str, folder: Path, captions: str, steps: int) -> tuple[Any, Iterator[Any]]:
    """The trainer of a recipe, and its batches."""
    settings = load_yaml(find(f"shapes-{name}"))
    config_class, trainer_class = load_method(settings["method"])
    settings |= {"output_dir": str(folder / name), "report_to": ["none"]}
    if settings["method"] == "dcpo":
        settings["dataset_name"] = captions
    trainer = trainer_class(from_dict(config_class, settings, name))
    return trainer, trainer.batches.stream(0, steps)


def measure(names: list[str], captions: str, rounds: int, warmup: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a step of each, and its ratio to the baseline's."""
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: make(name, Path(folder), captions, rounds + warmup) for name in names}
        for _ in range(rounds + warmup):
            for name, (trainer, stream) in runs.items():
                start = time.perf_counter()
                trainer.training_step(stream)
                times[name].append(time.perf_counter() - start)
    base = np.array(times[BASELINE][warmup:])
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        own = np.array(times[name][warmup:])
        low, middle, high = np.percentile(own / base, [25, 50, 75])
        result[name] = {
            "seconds": round(float(np.median(own)), 4),
            "ratio": round(float(middle), 3),
            "ratio_quartiles": [round(float(low), 3), round(float(high), 3)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--captions", default="runs/shapes-captions", help="pairs with captions, for dcpo")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "methods": measure(args.methods, args.captions, args.rounds, args.warmup),
        "rounds": args.rounds,
        "command": "python benchmarks/method_steps.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {args.threads} thread(s)",
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "peft")},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
