#!/usr/bin/env python
"""Trials of settings on the shapes world, judged on captions of the training split: what recipes are chosen by.

    python benchmarks/shapes_trials.py shapes-mapo --set beta_mapo=0.1 mapo_temperature=1000 learning_rate=1e-3
    python benchmarks/shapes_trials.py shapes-dpo --guidance 2 5
    python benchmarks/shapes_trials.py shapes-lcd --scheduler lcm:original_inference_steps=10 --steps 2 4 --guidance 1
    python benchmarks/shapes_trials.py shapes-ddpo --scheduler ddpm ddim --steps 10 25 --guidance 1
    python benchmarks/shapes_trials.py shapes-mapo --set mapo_temperature=1000 --margins 640

Trains a recipe with other settings, draws 256 captions with the base model and with the result at each guidance
scale, same seeds, and prints the win rate against the base at the same scale, with the same sampler and steps.
Several samplers and several numbers of steps go in pairs, or one of them with each of the other.
Held-out captions are not touched: methods on rewards judge themselves by captions of the training split, too.
``--margins`` trains nothing: it prints how a pair loss's ``margin`` is spread over so many single pairs before the
first step.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import yaml

from diffalign.config import from_dict, load_yaml
from diffalign.evaluation import shapes
from diffalign.evaluation.stats import paired_difference
from diffalign.recipes import find
from diffalign.shapes.scene import sample_captions
from diffalign.trainers import load_method

CAPTIONS, SEED = 256, 5


def captions() -> list[str]:
    """What models are judged on."""
    return sample_captions(CAPTIONS, SEED, heldout=False)


def make(recipe: str, settings: list[str], folder: Path, more: dict[str, Any]) -> Any:
    """The trainer of a recipe with other settings, each "name=value" in YAML."""
    changed = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in settings)}
    quiet = {"output_dir": str(folder), "report_to": ["none"], "checkpointing_steps": 0, "validation_prompts": None}
    whole = load_yaml(find(recipe)) | quiet | changed | more
    if whole.get("heldout_prompts"):
        whole["heldout_prompts"] = f"{__file__}:captions"
    config_class, trainer_class = load_method(whole["method"])
    return trainer_class(from_dict(config_class, whole, recipe))


def margins(recipe: str, settings: list[str], pairs: int) -> None:
    """Print the spread of ``margin`` over single pairs, under the base model."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trainer = make(recipe, settings, Path(folder), {"train_batch_size": 1, "max_train_steps": pairs})
        batches = islice(trainer.batches.stream(0, pairs), pairs)
        values = torch.stack([trainer.compute_loss(batch)[1]["margin"] for batch in batches])
    far = float((values.abs() > 3).float().mean())
    print(f"margin of {pairs} pairs: mean {values.mean():.3f}, deviation {values.std():.3f}, beyond 3: {far:.3f}")


def trial(recipe: str, settings: list[str], scales: list[float], ways: list[tuple[str | None, int]]) -> None:
    """Train, draw in each way (sampler and steps) at each scale, judge, print."""
    prompts = captions()
    with tempfile.TemporaryDirectory() as folder:
        make(recipe, settings, Path(folder), {}).train()
        for scale, (scheduler, steps) in product(scales, ways):
            drawn = {"scheduler": scheduler, "steps": steps, "guidance": scale, "batch_size": 64}
            base, own = (
                shapes.judge(shapes.draw(prompts, lora=lora, **drawn), prompts) for lora in (None, Path(folder))
            )
            rates = ", ".join(
                f"{name} {r.rate:.3f} [{r.low:.3f}, {r.high:.3f}]" for name, r in shapes.compare(own, base).items()
            )
            change = paired_difference(own.checker, base.checker)
            how = f"guidance {scale:g}, {scheduler or 'own sampler'} in {steps} steps"
            print(
                f"{recipe} {' '.join(settings)} at {how}: checker {base.checker.mean():.3f} -> "
                f"{own.checker.mean():.3f}, by {change.mean:.3f} [{change.low:.3f}, {change.high:.3f}]; "
                f"win rate by {rates}"
            )


def ways_of(schedulers: list[str | None], steps: list[int]) -> list[tuple[str | None, int]]:
    """Samplers with their steps: paired, or one with each of the others."""
    if len(schedulers) == len(steps):
        return list(zip(schedulers, steps, strict=True))
    if 1 not in (len(schedulers), len(steps)):
        raise SystemExit(f"{len(schedulers)} samplers and {len(steps)} numbers of steps: as many, or one of either")
    return list(product(schedulers, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--guidance", nargs="+", type=float, default=[shapes.GUIDANCE])
    parser.add_argument("--scheduler", nargs="+", help="lcm, ddim, ..., with options; default: the model's own")
    parser.add_argument("--steps", nargs="+", type=int, default=[shapes.STEPS])
    parser.add_argument("--margins", type=int, metavar="PAIRS")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.margins:
        margins(args.recipe, args.set, args.margins)
    else:
        trial(args.recipe, args.set, args.guidance, ways_of(args.scheduler or [None], args.steps))


if __name__ == "__main__":
    main()
