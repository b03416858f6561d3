#!/usr/bin/env python
"""How often do rewards agree with choices that nothing was tuned on? On the held-out pairs of the shapes world.

    python benchmarks/reward_accuracy.py --seeds 0 1 2 --out benchmarks/results/reward_accuracy.json

Measures what can be reached at all (the annotators' own utilities, without their noise), the bundled ``shapes-clip``,
and a reward that ``diffalign train-reward`` trains from random weights by the recipe ``shapes-reward``, with each
seed.
A run whose folder holds a report is not repeated. ``python benchmarks/render_results.py`` shows the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from diffalign.app import console
from diffalign.data.readers import PairSource, open_pairs
from diffalign.evaluation.calibration import pairwise_accuracy
from diffalign.rewards import load_reward
from diffalign.shapes.annotators import utility

Floats = NDArray[np.float64]
LIBRARIES = ("torch", "transformers", "accelerate")


class Heldout:
    """The held-out pairs: pictures, prompts, users and labels, ties kept."""

    def __init__(self) -> None:
        source = open_pairs("shapes-pairs", split="heldout", ties="keep")
        assert isinstance(source, PairSource)
        pairs = list(source)
        self.images = [picture.decode() for pair in pairs for picture in (pair.chosen, pair.rejected)]
        self.prompts = [pair.prompt for pair in pairs for _ in range(2)]
        self.users = [int(pair.user_id or 0) for pair in pairs for _ in range(2)]
        self.labels = np.array([pair.label for pair in pairs])
        # A picture is in several pairs: once is enough where pictures are ranked.
        places = {
            (image.tobytes(), prompt): i
            for i, (image, prompt) in enumerate(zip(self.images, self.prompts, strict=True))
        }
        self.distinct = sorted(places.values())

    def measure(self, scores: Floats, checker: Floats) -> dict[str, Any]:
        """Accuracy of scores (2N,) on the pairs, and their rank correlation with the checker on the pictures."""
        accuracy = pairwise_accuracy(scores[0::2] - scores[1::2], self.labels)
        assert accuracy is not None
        rank = spearmanr(scores[self.distinct], checker[self.distinct]).statistic
        return {**rounded(dataclasses.asdict(accuracy)), "rank_correlation_with_checker": round(float(rank), 4)}

    def by(self, reward: str) -> Floats:
        """Scores of a reward found by name, (2N,)."""
        found: Floats = load_reward(reward, device="cpu")(self.images, self.prompts).rewards.double().numpy()
        return found

    def each(self, function: Callable[[Any, str, int], float]) -> Floats:
        """A function of picture, prompt and user, (2N,)."""
        return np.array([function(*row) for row in zip(self.images, self.prompts, self.users, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--runs", type=Path, default=Path("runs/reward_accuracy"), help="folder of the training runs")
    args = parser.parse_args()
    console.set_up()
    heldout = Heldout()
    checker = heldout.by("shapes-checker")
    result: dict[str, Any] = {
        "pairs": len(heldout.labels),
        "ties": int((heldout.labels == 0.5).sum()),
        "images": len(heldout.distinct),
        "utility_of_the_user": heldout.measure(heldout.each(utility), checker),
        "mean_utility": heldout.measure(heldout.each(lambda image, prompt, user: utility(image, prompt)), checker),
        "checker": heldout.measure(checker, checker),
        "shapes_clip": heldout.measure(heldout.by("shapes-clip"), checker),
        "trained": [train(seed, args.runs, heldout, checker) for seed in args.seeds],
        "command": f"python benchmarks/reward_accuracy.py --seeds {' '.join(map(str, args.seeds))} --out {args.out}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("mean_utility", "shapes_clip", "trained")}, indent=1))


def train(seed: int, runs: Path, heldout: Heldout, checker: Floats) -> dict[str, Any]:
    """Train with one seed, unless the folder holds the result, and measure."""
    folder = runs / f"seed-{seed}"
    command = [sys.executable, "-m", "diffalign", "train-reward", "--config", "shapes-reward", "--seed", str(seed)]
    command += ["--output_dir", str(folder), "--report_to", "none"]
    if not (folder / "report.json").exists():
        subprocess.run([*command, "--resume_from_checkpoint", "latest"], check=True)
    report = json.loads((folder / "report.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        **heldout.measure(heldout.by(f"trained:{folder}"), checker),
        "validation_accuracy": rounded(report["validation_accuracy"])["rate"],
        "before_training": rounded(report["start_heldout_accuracy"])["rate"],
        "expected_calibration_error": round(report["calibration"]["after"]["expected_calibration_error"], 4),
        "steps": report["run"]["steps"],
        "best_step": report["run"]["best_step"],
        "step_seconds": round(float(np.median([row["step_seconds"] for row in rows])), 4),
    }


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Shares with four digits."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


if __name__ == "__main__":
    main()
