#!/usr/bin/env python
"""Methods on rewards, on the shapes world: how fast each raises a reward, and a reward that is hacked.

    python benchmarks/shapes_rewards.py --out benchmarks/results/shapes_rewards.json
    python benchmarks/shapes_rewards.py --experiments checker --methods awm ddpo --seeds 0 --out ...

Three experiments, each a training run with the recipe ``shapes-<method>`` in a process of its own:

checker  the reward is the checker (of reward-gradient, which needs a gradient, the bundled CLIP); the checker and the
         annotators judge
jpeg     the reward is jpeg_compressibility; the checker judges
hack     the same with AWM and a long run at a high learning rate, twice: with and without the early stop

A record has the curve of every reward on the run's held-out prompts, against images drawn and against the time of its
steps (judging left out), and scores of other held-out prompts, drawn by plain diffusers with the base model and with
the result. A record that is there is kept and its run not repeated; ``--again`` repeats it. Flags that are not known
here go to training. ``python benchmarks/render_results.py`` makes the page and the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes_methods import LIBRARIES
from torchvision.transforms.functional import to_tensor

from diffalign.app import console
from diffalign.config import write_text
from diffalign.data.prompts import read_prompts
from diffalign.evaluation.shapes import draw, heldout_prompts
from diffalign.evaluation.stats import paired_difference
from diffalign.rewards import load_reward

METHODS = ("ddpo", "rwr", "awm", "nft", "reward-gradient")
JUDGES = ("shapes-checker", "shapes-annotator", "jpeg_compressibility", "shapes-clip")
HACK = {"max_train_steps": 120, "learning_rate": 1e-3, "kl_beta": 0, "ema_beta": 0.1}
"""What makes AWM over-optimise: no pull to the reference, a weak one to the slow copy, three times the step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experiments", nargs="+", choices=("checker", "jpeg", "hack"), default=["checker", "jpeg", "hack"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--images", type=int, default=512, help="held-out prompts of the final judgement, one image each"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes_rewards"), help="folder of the training runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the records are added to")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a record")
    args, more = parser.parse_known_args()

    records: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    # The run's own held-out prompts choose nothing here, but what it is judged by at the end is yet others.
    seen = {prompt.text for prompt in read_prompts("shapes-heldout")}
    prompts = [prompt for prompt in heldout_prompts(args.images + len(seen)) if prompt not in seen][: args.images]
    base: dict[str, np.ndarray] | None = None
    console.set_up()
    for experiment, method, seed in todo(args.experiments, args.methods, args.seeds):
        name = (experiment, method, seed)
        if name in map(key, records) and not args.again:
            print(*name, "has a record")
            continue
        base = base if base is not None else score(prompts, None)
        record = measure(experiment, method, seed, args.runs, prompts, base, more)
        records = sorted([r for r in records if key(r) != name] + [record], key=key)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(records, indent=1) + "\n")
        print(json.dumps({n: record[n] for n in ("experiment", "method", "seed", "change")}))


def todo(experiments: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """The runs: all of seed 0 first."""
    runs = [(e, m, s) for s in seeds for e in experiments if e != "hack" for m in methods]
    runs = [run for run in runs if run[:2] != ("jpeg", "reward-gradient")]
    hacks = [("hack", m, s) for s in seeds for m in ("awm", "awm, stopped early")]
    return sorted(runs + (hacks if "hack" in experiments else []), key=lambda run: run[2])


def key(record: dict[str, Any]) -> tuple[str, str, int]:
    """What tells records apart."""
    return record["experiment"], record["method"], record["seed"]


def trained_reward(experiment: str, method: str) -> str:
    """The reward that a run learns from."""
    if method == "reward-gradient":
        return "shapes-clip"
    return "shapes-checker" if experiment == "checker" else "jpeg_compressibility"


def command_of(experiment: str, method: str, seed: int, run: Path, more: Sequence[str]) -> list[str]:
    """The training run as a command."""
    recipe, _, stopped = method.partition(", ")
    trained = trained_reward(experiment, recipe)
    judges = [name for name in JUDGES if name != trained] if experiment != "hack" else ["shapes-checker"]
    rewards = [trained, *(f"{{reward: {name}, eval_only: true}}" for name in judges)]
    own = {"seed": seed, "output_dir": run, **(HACK if experiment == "hack" else {})}
    command = [sys.executable, "-m", "diffalign", "train", "--config", f"shapes-{recipe}", "--rewards", *rewards]
    command += [word for name, value in own.items() for word in (f"--{name}", str(value))]
    return [*command, *(["--early_stop"] if stopped else []), "--overwrite_output_dir", *more]


def measure(
    experiment: str,
    method: str,
    seed: int,
    runs: Path,
    prompts: list[str],
    base: dict[str, np.ndarray],
    more: Sequence[str],
) -> dict[str, Any]:
    """Train one method, draw, judge; returns the record."""
    run = runs / f"{experiment}-{method.replace(', ', '-').replace(' ', '-')}-{seed}"
    command = command_of(experiment, method, seed, run, more)
    subprocess.run(command, check=True)
    rows, judged = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "heldout.jsonl")
    )
    aligned = score(prompts, run)
    changes = {name: paired_difference(aligned[name], base[name]) for name in JUDGES}
    return {
        "experiment": experiment,
        "method": method,
        "seed": seed,
        "trained_reward": trained_reward(experiment, method.partition(",")[0]),
        "curve": curve(rows, judged),
        "base": {name: round(float(base[name].mean()), 4) for name in JUDGES},
        "change": {name: [round(x, 4) for x in (d.mean, d.low, d.high)] for name, d in changes.items()},
        "heldout_images": len(prompts),
        "steps": rows[-1]["step"],
        "best_step": judged[-1]["best_step"],
        "images": int(rows[-1]["images"]),
        "group_distance": [rows[i].get("group_distance") for i in (0, -1)],
        "command": "diffalign " + " ".join(f"'{w}'" if " " in w else w for w in command[3:]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }


def curve(rows: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Means of every reward at each evaluation, with the images drawn and the seconds of steps until then."""
    seconds = np.cumsum([row["step_seconds"] for row in rows])
    points = []
    for evaluation in judged:
        step = evaluation["step"]
        rewards = {n.removeprefix("heldout/"): round(v, 5) for n, v in evaluation.items() if n.startswith("heldout/")}
        images = int(rows[step - 1]["images"]) if step else 0
        points.append(
            {"step": step, "images": images, "seconds": round(float(seconds[step - 1]) if step else 0, 2)} | rewards
        )
    return points


def score(prompts: list[str], run: Path | None) -> dict[str, np.ndarray]:
    """Scores of every judge of one image a prompt, by the base model or by a run's result."""
    images = draw(prompts, lora=run, progress=run.name if run else "base")
    tensors = torch.stack([to_tensor(image) for image in images])
    return {name: load_reward(name)(tensors, prompts).rewards.double().numpy() for name in JUDGES}


if __name__ == "__main__":
    main()
