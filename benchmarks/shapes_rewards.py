#!/usr/bin/env python
"""Methods on rewards, on the shapes world: how fast each raises a reward, and a reward that is hacked.

    python benchmarks/shapes_rewards.py --out benchmarks/results/shapes_rewards.json
    python benchmarks/shapes_rewards.py --experiments checker --methods awm ddpo --seeds 0 --out ...

Three experiments, each a training run with the recipe ``shapes-<method>``:

checker  the reward is the checker (of reward-gradient, which needs a gradient, the bundled CLIP); the checker and the
         annotators judge
jpeg     the reward is jpeg_compressibility, for DDPO and AWM; the checker judges
hack     the same with DDPO, which has no pull to the reference, judged more often, with the early stop

A record has the curve of every reward on the run's own held-out prompts (``shapes-validation``), against images drawn
and against the processor time of its steps, which on one thread is the time that they take on an idle machine; and
scores of the prompts that results are reported on, drawn by plain diffusers with the base model and with the result,
by three samplers. A record that is there is kept and its run not repeated; ``--again`` repeats it.
``python benchmarks/render_results.py`` makes the page and the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from shapes_methods import LIBRARIES
from torchvision.transforms.functional import to_tensor

from diffalign.app import console
from diffalign.config import from_dict, load_yaml, write_text
from diffalign.evaluation.shapes import draw, heldout_prompts
from diffalign.evaluation.stats import paired_difference
from diffalign.recipes import find
from diffalign.rewards import load_reward
from diffalign.trainers import load_method

Scores = dict[str, dict[str, np.ndarray]]
"""Of each way of drawing and each judge, (prompts,)."""
METHODS = ("ddpo", "rwr", "awm", "nft", "reward-gradient")
JUDGES = ("shapes-checker", "shapes-annotator", "jpeg_compressibility", "shapes-clip")
WAYS = {"ddpm 10": ("ddpm", 10), "ddim 10": ("ddim", 10), "ddim 25": ("ddim", 25)}
"""Samplers that results are drawn by: with noise, as DDPO's rollouts (ddpm is DDIM with eta 1); without, as those of
the others; and without in more steps, as the base model is drawn elsewhere."""
ALL = {"evaluation_eta": 1.0, "num_heldout_prompts": 384}
"""What differs from the recipes in all runs: points of their curves are of more prompts, drawn with noise, as only
DDPO's recipe has it."""
JPEG = {"ddpo": 40, "awm": 20}
"""Updates with jpeg_compressibility, 20 rollouts for each: it moves sooner."""
HACK = {"evaluation_steps": 4, "early_stop": True}
"""What differs from the jpeg runs there: the sooner a run is judged, the sooner it stops."""


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
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings than the recipe's")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    more = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in args.set)}

    records: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    prompts = heldout_prompts(args.images)
    bases: dict[float, Scores] = {}
    console.set_up()
    for experiment, method, seed in todo(args.experiments, args.methods, args.seeds):
        name = (experiment, method, seed)
        if name in map(key, records) and not args.again:
            print(*name, "has a record")
            continue
        guidance = float({**load_yaml(find(recipe_of(method))), **more}["guidance_scale"])
        if guidance not in bases:
            bases[guidance] = score(prompts, None, guidance)
        record = measure(experiment, method, seed, args.runs, prompts, guidance, bases[guidance], more)
        records = sorted([r for r in records if key(r) != name] + [record], key=key)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(records, indent=1) + "\n")
        print(json.dumps({n: record[n] for n in ("experiment", "method", "seed", "change")}), flush=True)


def todo(experiments: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """The runs: all of seed 0 first."""
    runs = [(e, m, s) for s in seeds for e in experiments if e != "hack" for m in methods]
    runs = [(e, m, s) for e, m, s in runs if e != "jpeg" or m in JPEG]
    hacks = [("hack", "ddpo, stopped early", s) for s in seeds if "hack" in experiments]
    return sorted(runs + hacks, key=lambda run: run[2])


def key(record: dict[str, Any]) -> tuple[str, str, int]:
    """What tells records apart."""
    return record["experiment"], record["method"], record["seed"]


def recipe_of(method: str) -> str:
    """The recipe that a method of the table is trained with."""
    return f"shapes-{method.partition(', ')[0]}"


def trained_reward(experiment: str, method: str) -> str:
    """The reward that a run learns from."""
    if method == "reward-gradient":
        return "shapes-clip"
    return "shapes-checker" if experiment == "checker" else "jpeg_compressibility"


def settings_of(experiment: str, method: str, seed: int, runs: Path, more: dict[str, Any]) -> dict[str, Any]:
    """What is trained, and how, beside what the recipe says."""
    recipe = method.partition(", ")[0]
    trained = trained_reward(experiment, recipe)
    judges = [name for name in JUDGES if name != trained] if experiment != "hack" else ["shapes-checker"]
    return {
        "rewards": [trained, *({"reward": name, "eval_only": True} for name in judges)],
        **(
            {} if experiment == "checker" else {"max_train_steps": JPEG[recipe], "evaluation_steps": JPEG[recipe] // 6}
        ),
        **(HACK if experiment == "hack" else {}),
        "seed": seed,
        "output_dir": str(runs / f"{experiment}-{method.replace(', ', '-').replace(' ', '-')}-{seed}"),
        **more,
    }


def train(recipe: str, settings: dict[str, Any]) -> Path:
    """Run it; rows of its metrics have the processor time of each step, ``step_cpu_seconds``. Returns its folder."""
    whole = load_yaml(find(recipe)) | settings | {"overwrite_output_dir": True, "checkpointing_steps": 0}
    config_class, trainer_class = load_method(whole["method"])
    trainer = trainer_class(from_dict(config_class, whole, recipe))
    take = trainer.training_step

    def timed(stream: Iterator[Any]) -> dict[str, float]:
        start = time.process_time()
        metrics: dict[str, float] = take(stream)
        return {**metrics, "step_cpu_seconds": time.process_time() - start}

    trainer.training_step = timed
    folder: Path = trainer.train()
    return folder


def measure(
    experiment: str,
    method: str,
    seed: int,
    runs: Path,
    prompts: list[str],
    guidance: float,
    base: Scores,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Train one method, draw, judge; returns the record."""
    start = time.process_time()
    settings = ALL | settings_of(experiment, method, seed, runs, more)
    run = train(recipe_of(method), settings)
    rows, judged = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "heldout.jsonl")
    )
    aligned = score(prompts, run, guidance)
    return {
        "experiment": experiment,
        "method": method,
        "seed": seed,
        "trained_reward": trained_reward(experiment, method.partition(",")[0]),
        "curve": curve(rows, judged),
        "base": {way: {name: round(float(base[way][name].mean()), 4) for name in JUDGES} for way in WAYS},
        "change": {way: changes(aligned[way], base[way]) for way in WAYS},
        "heldout_images": len(prompts),
        "guidance": guidance,
        "steps": rows[-1]["step"],
        "best_step": judged[-1]["best_step"],
        "images": int(rows[-1]["images"]),
        "group_distance": [rows[i].get("group_distance") for i in (0, -1)],
        "reward_share": reward_share(rows),
        "cpu_seconds": round(time.process_time() - start),
        "settings": {name: value for name, value in settings.items() if name not in ("seed", "output_dir")},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }


def reward_share(rows: Sequence[dict[str, Any]]) -> float | None:
    """Time in rewards over time in steps, both on the wall; None where a method does not tell them apart."""
    rollouts = {row["rollout"]: row for row in rows if "rollout" in row}
    spent = sum(row["reward_seconds"] for row in rollouts.values())
    return round(spent / sum(row["step_seconds"] for row in rows), 4) if rollouts else None


def curve(rows: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Means of every reward at each evaluation, with the images drawn and the time of steps until then."""
    seconds = np.cumsum([row["step_cpu_seconds"] for row in rows])
    points = []
    for evaluation in judged:
        step = evaluation["step"]
        rewards = {n.removeprefix("heldout/"): round(v, 5) for n, v in evaluation.items() if n.startswith("heldout/")}
        images = int(rows[step - 1]["images"]) if step else 0
        points.append(
            {"step": step, "images": images, "seconds": round(float(seconds[step - 1]) if step else 0, 2)} | rewards
        )
    return points


def score(prompts: list[str], run: Path | None, guidance: float) -> Scores:
    """Scores by every judge of one image a prompt, by the base model or by a run's result, drawn in each way."""
    scores = {}
    for way, (scheduler, steps) in WAYS.items():
        label = f"{run.name if run else 'base'} {way}"
        images = draw(prompts, lora=run, scheduler=scheduler, steps=steps, guidance=guidance, progress=label)
        tensors = torch.stack([to_tensor(image) for image in images])
        scores[way] = {name: load_reward(name)(tensors, prompts).rewards.double().numpy() for name in JUDGES}
    return scores


def changes(aligned: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """[mean, low, high] of each judge's paired difference."""
    found = {name: paired_difference(aligned[name], base[name]) for name in JUDGES}
    return {name: [round(x, 4) for x in (d.mean, d.low, d.high)] for name, d in found.items()}


if __name__ == "__main__":
    main()
