#!/usr/bin/env python
"""What a rollout costs over the diffusers pipeline, and what rewards cost of it.

    python benchmarks/rollout.py --out benchmarks/results/rollout.json

Both draw the same prompts from the same starting noise with equally many DDIM steps, batch and guidance, to images in
memory; batches are drawn in turns, so both meet the same machine. A third way keeps every step of the sampler, as DDPO
needs it. The share of rewards is that of a CLIP-size scorer in a rollout through the trainer, where images are scored
while the next batch is drawn. Records are added to the file. On a GPU with real weights:

    python benchmarks/rollout.py --model stabilityai/stable-diffusion-xl-base-1.0 --reward pickscore --dtype bf16 \
        --batch_size 4 --steps 30 --decode_batch_size 1
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_record import about, add_record

from diffalign.config import from_dict, load_yaml
from diffalign.diffusion.steps import make_steps
from diffalign.evaluation.stats import paired_difference
from diffalign.pipelines import load_family
from diffalign.pipelines.base import Family
from diffalign.recipes import find
from diffalign.shapes.scene import sample_captions
from diffalign.trainers.awm import AWMConfig, AWMTrainer
from diffalign.training.loop import DTYPES
from diffalign.training.rollout import Condition, rollout, starting_noise

SETTINGS = ("model", "dtype", "batch_size", "steps", "guidance", "rounds", "rollouts")
BATCHES = 4
"""Batches of a rollout through the trainer."""


@dataclass
class Clock:
    """Seconds of each round: on the wall, and of this process's CPU time."""

    wall: list[float]
    cpu: list[float]


class Drawing:
    """The ways to draw a batch that are compared."""

    def __init__(self, family: Family, args: argparse.Namespace) -> None:
        side = family.default_resolution
        self.family, self.guidance, self.chunk = family, args.guidance, args.decode_batch_size
        self.prompts = sample_captions(args.batch_size, 0)
        self.seeds = list(range(args.batch_size))
        self.shape = family.latent_shape(side, side)
        self.steps = {
            eta: make_steps(family.noise_process, family.scheduler_config, args.steps, eta=eta) for eta in (0.0, 1.0)
        }
        self.pipe: Any = family.pipeline(scheduler="ddim")
        if self.chunk == 1:
            self.pipe.vae.enable_slicing()

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
            return self.family.decode_latents(drawn.latents.to(self.family.device), chunk=self.chunk).cpu()

    def diffusers(self) -> torch.Tensor:
        """The same images by the pipeline."""
        images: torch.Tensor = self.pipe(
            prompt=self.prompts,
            latents=starting_noise(self.seeds, self.shape).to(self.family.device, self.family.dtype),
            num_inference_steps=len(self.steps[0.0]),
            guidance_scale=self.guidance,
            output_type="pt",
        ).images
        return images.float().cpu()


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Clock]:
    """Times of each way in each round, after one round that does not count; every round in an order of its own."""
    times = {name: Clock([], []) for name in ways}
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        names = list(ways)
        shuffle(names)
        for name in names:
            wall, own = time.perf_counter(), time.process_time()
            ways[name]()
            if number:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - own)
    return times


def ratio(theirs: list[float], ours: list[float]) -> list[float]:
    """How many times as fast ours is: the mean of log-ratios over the rounds, with its 95 % interval."""
    change = paired_difference(np.log(theirs), np.log(ours))
    return [round(math.exp(x), 4) for x in (change.mean, change.low, change.high)]


def drawing(args: argparse.Namespace) -> dict[str, Any]:
    """Images a second by each way, ours over the pipeline's, and how much the images differ."""
    compared = Drawing(load_family(args.model, device=args.device, dtype=DTYPES[args.dtype]), args)
    off = (compared.ours() - compared.diffusers()).abs()
    times = in_turns(
        {
            "diffusers": compared.diffusers,
            "rollout": compared.ours,
            "rollout_keeping_steps": lambda: compared.ours(eta=1.0, keep=True),
        },
        args.rounds,
    )
    result: dict[str, Any] = {"largest_difference": float(off.max()), "mean_difference": float(off.mean())}
    for name, clock in times.items():
        result[f"{name}_images_per_second"] = args.batch_size / float(np.median(clock.wall))
        if name != "diffusers":
            result[f"{name}_over_diffusers"] = ratio(times["diffusers"].wall, clock.wall)
            # Of the process's own time, which others on the machine hardly touch; on a GPU it means nothing.
            if args.device == "cpu":
                result[f"{name}_over_diffusers_cpu_time"] = ratio(times["diffusers"].cpu, clock.cpu)
    return result


def rewards(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a reward, of drawing, and of whole rollouts through the trainer."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = load_yaml(find("shapes-awm")) | {
            "pretrained_model_name_or_path": args.model,
            "output_dir": folder,
            "report_to": ["none"],
            "rewards": [args.reward],
            "resolution": None,
            "mixed_precision": args.dtype,
            "num_inference_steps": args.steps,
            "guidance_scale": args.guidance,
            "num_prompts_per_rollout": BATCHES * args.batch_size // 8,
            "decode_batch_size": args.decode_batch_size or args.batch_size,
            "rollout_batch_size": args.batch_size,
            "train_batch_size": args.batch_size,
        }
        del settings["heldout_prompts"]
        trainer = AWMTrainer(from_dict(AWMConfig, settings, "shapes-awm"))
        for number in range(args.rollouts + 1):
            trainer.collect(number)
            rows.append(dict(trainer.stats))
    names = ("rollout_seconds", "sampling_seconds", "reward_seconds")
    medians = {name: float(np.median([row[name] for row in rows[1:]])) for name in names}
    waited = medians["rollout_seconds"] - medians["sampling_seconds"]
    return {
        "reward": args.reward,
        "images": BATCHES * args.batch_size,
        **medians,
        "reward_share_of_work": medians["reward_seconds"] / medians["rollout_seconds"],
        "share_of_time_waiting_for_rewards": waited / medians["rollout_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-sdxl")
    parser.add_argument("--reward", default="shapes-clip", help="a CLIP-size scorer for the model's size")
    parser.add_argument("--dtype", choices=list(DTYPES), default="no")
    parser.add_argument("--batch_size", type=int, default=32, help="a multiple of 8, or 2 or 4")
    parser.add_argument("--decode_batch_size", type=int, help="images the VAE decodes at once; all by default")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=12, help="batches drawn in each way")
    parser.add_argument("--rollouts", type=int, default=3, help="rollouts through the trainer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = about(torch.device(args.device)) | {
        "drawing": drawing(args),
        "rewards": rewards(args),
        "settings": {name: getattr(args, name) for name in SETTINGS},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        add_record(args.out, result)


if __name__ == "__main__":
    main()
