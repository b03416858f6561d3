#!/usr/bin/env python
"""Does each method move what it promises to move? On the shapes world, held-out prompts, same seeds, several runs.

    python benchmarks/shapes_methods.py --methods dpo mapo --seeds 0 1 2 --out benchmarks/results/shapes_methods.json
    python benchmarks/shapes_methods.py --methods bdpo --out ... --bdpo_lambda 0.9

Trains every method with its recipe ``shapes-<method>`` and every seed, in a process of its own, draws the held-out
prompts with the base model and with the result, and adds one record to the file. A record that is there is kept and
its run not repeated; ``--again`` repeats it. ``--dataset_name`` trains on other pairs than the recipe's. For methods
that need captions of single images they are made first. Flags that are not known here go to training; what was
trained with them has a row of its own. Runs that another benchmark trained with the same recipe need not be trained
again: ``--trained 'runs/shapes_rewards/checker-{method}-{seed}'`` draws and judges those.
``python benchmarks/render_results.py`` makes docs/results.md of the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.app import console
from diffalign.assets import resolve
from diffalign.config import load_yaml
from diffalign.evaluation.shapes import GUIDANCE, STEPS, Judgement, compare, draw, heldout_prompts, judge
from diffalign.recipes import find
from diffalign.trainers import load_method

CAPTIONED = {"dcpo"}
"""Methods whose data needs a caption for each image: the checker's description."""
FREE = {
    "rewards",
    "output_dir",
    "evaluation_eta",
    "num_heldout_prompts",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_scheduler",
}
"""Settings of a recipe that may differ in a run that is taken as trained: of judging it, and where things are kept."""
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the records are added to")
    parser.add_argument("--images", type=int, default=1024, help="held-out prompts, one image each and model")
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes_methods"), help="folder of the training runs")
    parser.add_argument("--dataset_name", default="shapes-pairs", help="preferences to train on")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a record")
    parser.add_argument("--trained", help="folders of runs that are trained already, with {method} and {seed} in it")
    args, more = parser.parse_known_args()

    records: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    todo = [(method, seed, data_of(method, args.dataset_name)) for method in args.methods for seed in args.seeds]
    have, flags = set(map(key, records)), " ".join(more)
    prompts = heldout_prompts(args.images)
    bases: dict[float, Judgement] = {}
    console.set_up()
    for method, seed, data in todo:
        if (method, seed, data, flags) in have and not args.again:
            print(f"{method} seed {seed} on {data}: has a record")
            continue
        guidance = guidance_of(load_yaml(find(f"shapes-{method}")))
        if guidance not in bases:
            bases[guidance] = base_judgement(prompts, args.runs, guidance)
        if args.trained:
            run = Path(args.trained.format(method=method, seed=seed))
            trained = trained_already(run, method, seed) | {"trained": args.trained}
        else:
            run, trained = train(method, seed, data, args.runs, more)
        record = measure(run, method, seed, data, prompts, bases[guidance], trained)
        records = [r for r in records if key(r) != (method, seed, data, flags)] + [record]
        write(args.out, records)
        print(json.dumps({k: record[k] for k in ("method", "seed", "checker_score", "win_rate_annotator")}))


def key(record: dict[str, Any]) -> tuple[str, int, str, str]:
    """What tells records apart."""
    return record["method"], record["seed"], record.get("data", "shapes-pairs"), record.get("flags", "")


def data_of(method: str, pairs: str) -> str:
    """What a method learns from: pairs, or the prompts that its recipe draws."""
    return str(load_yaml(find(f"shapes-{method}")).get("prompts", pairs))


def prepare(method: str, data: str, runs: Path) -> list[str]:
    """Make what the method's data lacks; returns the flags that name the data."""
    if method not in CAPTIONED:
        recipe = load_yaml(find(f"shapes-{method}")).get("dataset_name")
        return [] if recipe is None or recipe == data else ["--dataset_name", data]
    folder = runs / "captions" / Path(data).stem
    command = [sys.executable, "-m", "diffalign", "captions", data, "--captioner", "shapes-checker"]
    subprocess.run([*command, "--output_dir", str(folder)], check=True)
    return ["--dataset_name", str(folder)]


def guidance_of(config: dict[str, Any]) -> float:
    """The scale that the base model is drawn at: that of a method's own drawing, where it draws to learn."""
    return float(config["guidance_scale"] if "prompts" in config else GUIDANCE)


def base_judgement(prompts: list[str], runs: Path, guidance: float = GUIDANCE) -> Judgement:
    """The base model on the prompts, drawn once and then read from ``runs``: it is the same for every method."""
    digest = hashlib.sha256(json.dumps([prompts, STEPS, guidance]).encode())
    for weights in sorted(Path(resolve("shapes-sdxl")).rglob("*.safetensors")):
        digest.update(weights.read_bytes())
    path = runs / f"base-{digest.hexdigest()[:12]}.npz"
    if path.exists():
        with np.load(path) as stored:
            return Judgement(stored["checker"], stored["annotator"])
    base = judge(draw(prompts, guidance=guidance, progress="base"), prompts)
    runs.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(aside, checker=base.checker, annotator=base.annotator)
    os.replace(aside, path)
    return base


def train(method: str, seed: int, data: str, runs: Path, more: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Train one method with one seed (``more`` are flags of training); returns its folder and what it took."""
    words = [method, *([] if data == "shapes-pairs" else [Path(data).stem]), *(word.strip("-") for word in more)]
    run = runs / "-".join([*words, str(seed)])
    command = [sys.executable, "-m", "diffalign", "train", "--config", f"shapes-{method}"]
    command += [*prepare(method, data, runs), "--seed", str(seed)]
    command += ["--output_dir", str(run), "--overwrite_output_dir", *more]
    start = time.monotonic()
    # wait4 tells of this process alone; getrusage would give the largest of all that ran before.
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
    return run, {
        **({"flags": " ".join(more)} if more else {}),
        "train_seconds": round(time.monotonic() - start, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "command": "diffalign " + " ".join(command[3:]),
    }


def trained_already(run: Path, method: str, seed: int) -> dict[str, Any]:
    """What a finished run of the method's recipe took, as far as its log tells. Refuses one of other settings."""
    config, recipe = load_yaml(run / "config.yaml"), load_yaml(find(f"shapes-{method}"))
    wanted = {n: v for n, v in recipe.items() if n not in FREE} | {"seed": seed}
    others = [n for n, v in wanted.items() if config.get(n) != v]
    if others or trained_rewards(config) != trained_rewards(recipe):
        raise SystemExit(f"{run} was trained with other settings than shapes-{method}: {others or ['rewards']}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if len(rows) != config["max_train_steps"]:
        raise SystemExit(f"{run} has {len(rows)} steps of {config['max_train_steps']}")
    return {"train_seconds": round(sum(row["step_seconds"] for row in rows), 1)}


def trained_rewards(config: dict[str, Any]) -> list[str]:
    """Names of the rewards that are learnt from, without the judges."""
    entries = [{"reward": r} if isinstance(r, str) else r for r in config.get("rewards") or []]
    return [entry["reward"] for entry in entries if not entry.get("eval_only")]


def measure(
    run: Path, method: str, seed: int, data: str, prompts: list[str], base: Judgement, trained: dict[str, Any]
) -> dict[str, Any]:
    """Draw with a trained run, judge; returns the record, with ``trained`` in it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sampling = sampling_of(run, method)
    aligned = judge(draw(prompts, lora=run, progress=f"{method} {seed}", **sampling), prompts)
    rates = compare(aligned, base)
    return {
        "method": method,
        "seed": seed,
        "data": data,
        **trained,
        "images": len(prompts),
        "sampling": f"{sampling.get('steps', STEPS)} steps, guidance {sampling.get('guidance', GUIDANCE):g}",
        "base_checker_score": round(float(base.checker.mean()), 4),
        "checker_score": round(float(aligned.checker.mean()), 4),
        "base_annotator_utility": round(float(base.annotator.mean()), 4),
        "annotator_utility": round(float(aligned.annotator.mean()), 4),
        **{f"win_rate_{judge_}": [round(x, 4) for x in (r.rate, r.low, r.high)] for judge_, r in rates.items()},
        "steps": len(rows),
        "policy_forward_passes": policy_forward_passes(run, len(rows)),
        "step_seconds": round(float(np.median([row["step_seconds"] for row in rows])), 4),
        **{
            name: round(float(np.mean([row[name] for row in rows[-50:]])), 4)
            for name in ("implicit_accuracy", "pair_accuracy")
            if name in rows[-1]
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }


def sampling_of(run: Path, method: str) -> dict[str, Any]:
    """How the result is drawn: a distilled one by its recipe's sampler, in few steps; any other as the base model."""
    config, recipe = load_yaml(run / "config.yaml"), load_yaml(find(f"shapes-{method}"))
    config |= {"validation_scheduler": recipe.get("validation_scheduler", config.get("validation_scheduler"))}
    if config.get("validation_scheduler") is None:
        return {"guidance": guidance_of(config)}
    return {
        # The sampler's grid must be the solver's, or it stops at timesteps that nothing was learnt at.
        "scheduler": f"{config['validation_scheduler']}:original_inference_steps={config['num_ddim_timesteps']}:"
        f"timestep_scaling={config['timestep_scaling_factor']:g}",
        "steps": config["validation_inference_steps"],
        "guidance": config["validation_guidance_scale"],
    }


def policy_forward_passes(run: Path, steps: int) -> int:
    """Images that went through the policy in training: the budget that methods are compared at.

    Of methods on rewards also those that drew the images, twice with guidance.
    """
    config = load_yaml(run / "config.yaml")
    if "prompts" in config:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        guided = 2 if config["guidance_scale"] != 1 else 1
        trained = config.get("num_inner_epochs", 0) * (config.get("num_train_steps_per_image") or 0)
        if config["method"] == "ddpo":
            # All steps but the last, which has no noise.
            trained = (
                guided
                * config["num_inner_epochs"]
                * (config["num_train_steps_per_image"] or config["num_inference_steps"] - 1)
            )
        return int(last["images"] * (config["num_inference_steps"] * guided + trained))
    batch = config["train_batch_size"] * config["gradient_accumulation_steps"]
    return int(steps * batch * load_method(config["method"])[1].needs.policy_passes)


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write the records sorted; the file is complete or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(sorted(records, key=key), indent=1) + "\n")
    os.replace(aside, path)


if __name__ == "__main__":
    main()
