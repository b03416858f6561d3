#!/usr/bin/env python
"""What a rollout costs over the diffusers pipeline, and what rewards cost of it.

    python benchmarks/rollout.py --out benchmarks/results/rollout.json

Both draw the same prompts from the same starting noise with equally many DDIM steps, batch and guidance, to images in
memory; batches are drawn in turns, so both meet the same machine. A third way keeps every step of the sampler, as DDPO
needs it. The share of rewards is that of a CLIP-size scorer in a rollout through the trainer, where images are scored
while the next batch is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.config import from_dict, load_yaml
from diffalign.diffusion.steps import make_steps
from diffalign.pipelines import load_family
from diffalign.pipelines.base import Family
from diffalign.recipes import find
from diffalign.shapes.scene import sample_captions
from diffalign.trainers.awm import AWMConfig, AWMTrainer
from diffalign.training.rollout import Condition, rollout, starting_noise

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


class Drawing:
    """The ways to draw a batch that are compared."""

    def __init__(self, family: Family, batch: int, steps: int, guidance: float) -> None:
        side = family.default_resolution
        self.family, self.guidance = family, guidance
        self.prompts = sample_captions(batch, 0)
        self.seeds = list(range(batch))
        self.shape = family.latent_shape(side, side)
        self.steps = {
            eta: make_steps(family.noise_process, family.scheduler_config, steps, eta=eta) for eta in (0.0, 1.0)
        }
        self.pipe: Any = family.pipeline(scheduler="ddim")

    def ours(self, eta: float = 0.0, keep: bool = False) -> torch.Tensor:
        """As the online route draws: encode, sample, decode."""
        with torch.no_grad():
            given = Condition(
                self.family.encode_prompts(self.prompts), self.family.encode_unconditional(), self.guidance
            )
            chosen = self.steps[eta].stochastic if keep else []
            drawn = rollout(
                self.family, self.family.denoiser, self.steps[eta], given, self.seeds, self.shape, keep=chosen
            )
            return self.family.decode_latents(drawn.latents.to(self.family.device)).cpu()

    def diffusers(self) -> torch.Tensor:
        """The same images by the pipeline."""
        start = starting_noise(self.seeds, self.shape).to(self.family.device)
        images: torch.Tensor = self.pipe(
            prompt=self.prompts,
            latents=start,
            num_inference_steps=len(self.steps[0.0]),
            guidance_scale=self.guidance,
            output_type="pt",
        ).images
        return images.cpu()


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def drawing(args: argparse.Namespace) -> dict[str, Any]:
    """Images a second by each way, and ours over the pipeline's, round by round."""
    compared = Drawing(load_family(args.model, device=args.device), args.batch_size, args.steps, args.guidance)
    difference = float((compared.ours() - compared.diffusers()).abs().max())
    times = in_turns(
        {
            "diffusers": compared.diffusers,
            "rollout": compared.ours,
            "rollout_keeping_steps": lambda: compared.ours(eta=1.0, keep=True),
        },
        args.rounds,
    )
    theirs = np.array(times["diffusers"])
    return {
        "largest_difference_of_images": difference,
        **{f"{name}_images_per_second": args.batch_size / float(np.median(values)) for name, values in times.items()},
        **{
            f"{name}_over_diffusers": float(np.median(theirs / np.array(times[name])))
            for name in ("rollout", "rollout_keeping_steps")
        },
    }


def rewards(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a reward, of drawing, and of whole rollouts through the trainer."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = load_yaml(find("shapes-awm")) | {
            "pretrained_model_name_or_path": args.model,
            "output_dir": folder,
            "report_to": ["none"],
            "rewards": [args.reward],
            "num_inference_steps": args.steps,
            "guidance_scale": args.guidance,
            "num_prompts_per_rollout": 4 * args.batch_size // 8,
            "rollout_batch_size": args.batch_size,
            "train_batch_size": args.batch_size,
        }
        del settings["heldout_prompts"]
        trainer = AWMTrainer(from_dict(AWMConfig, settings, "shapes-awm"))
        for number in range(args.rounds + 1):
            trainer.collect(number)
            rows.append(dict(trainer.stats))
    names = ("rollout_seconds", "sampling_seconds", "reward_seconds")
    medians = {name: float(np.median([row[name] for row in rows[1:]])) for name in names}
    waited = medians["rollout_seconds"] - medians["sampling_seconds"]
    return {
        "reward": args.reward,
        "images": 4 * args.batch_size,
        **medians,
        "reward_share_of_work": medians["reward_seconds"] / medians["rollout_seconds"],
        "share_of_time_waiting_for_rewards": waited / medians["rollout_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-sdxl")
    parser.add_argument("--reward", default="shapes-clip", help="a CLIP-size scorer for the model's size")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "drawing": drawing(args),
        "rewards": rewards(args),
        "settings": {name: getattr(args, name) for name in ("model", "batch_size", "steps", "guidance", "rounds")},
        "command": "python benchmarks/rollout.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {args.threads} threads, {args.device}",
        "versions": {name: version(name) for name in LIBRARIES},
    }
    text = json.dumps(result, indent=1, default=float) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
