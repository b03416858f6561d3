#!/usr/bin/env python
"""Images a second of methods on rewards, end to end, at SDXL's real size with random weights.

    python benchmarks/rl_rate.py --methods awm nft --resolutions 1024 512 --inference_steps 10 \\
        --out benchmarks/results/rl_rate.json
    python benchmarks/rl_rate.py --methods ddpo --resolutions 512 --guidance 5 --checkpointing
    python benchmarks/rl_rate.py --model shapes-sdxl --device cpu --precision no --resolutions 64 --rollouts 2

Every row is a run of the method's own trainer: whole rollouts, from prompts to images, scored while the next are
drawn, and the optimiser steps that learn from them. Text embeddings are random and the text encoders left out, which a
rollout needs once for each prompt. The reward that needs no weights is the size of a JPEG; ``--reward`` names another.
Records are added to the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench_record import about, add_record, table
from sdxl_model import random_decoder, random_family, random_text
from sdxl_step import Device, attempt
from speed_tables import RATE_HEAD, rate_row

from diffalign.errors import UserError
from diffalign.pipelines.base import Family
from diffalign.trainers import load_method
from diffalign.training.online import OnlineTrainer


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    method: str
    resolution: int
    batch_size: int


def drawing_family(model: str, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> Family:
    """A model that draws: a random denoiser and VAE, and random embeddings for every prompt."""
    family: Any = random_family(model, device, dtype)
    family._vae = random_decoder(family, vae_dtype)
    family.encode_prompts = lambda prompts, **_: {
        name: value.to(family.device) for name, value in random_text(family, len(prompts)).items()
    }
    return family


def run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows share, of a method's config."""
    return {
        "rank": args.rank,
        "mixed_precision": args.precision,
        "gradient_checkpointing": args.checkpointing,
        "rewards": [args.reward],
        "num_prompts_per_rollout": args.prompts,
        "num_images_per_prompt": args.images_per_prompt,
        "num_inference_steps": args.inference_steps,
        "num_train_steps_per_image": args.train_steps,
        "guidance_scale": args.guidance,
        "decode_batch_size": args.decode_batch_size,
        **args.settings,
    }


def make_trainer(case: Case, family: Family, folder: Path, shared: dict[str, Any]) -> Any:
    """The trainer of a method on rewards, as it is.

    Raises:
        UserError: the method draws no rollouts.
    """
    config_class, trainer_class = load_method(case.method)
    if not issubclass(trainer_class, OnlineTrainer):
        raise UserError(f"{case.method} draws no rollouts: benchmarks/sdxl_step.py measures it")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(shared["num_prompts_per_rollout"])))
    own = {
        "pretrained_model_name_or_path": family.path,
        "output_dir": str(folder / "run"),
        "prompts": str(prompts),
        "report_to": ["none"],
        "max_train_steps": 1_000_000,
        "checkpointing_steps": 0,
        "resolution": case.resolution,
        "train_batch_size": case.batch_size,
        "rollout_batch_size": case.batch_size,
    }
    return trainer_class(config_class(**own | shared), family)


def measure(case: Case, family: Family, device: Device, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, family, Path(folder), run_settings(args))
        steps = trainer.arithmetic.steps_per_rollout
        stream = trainer.batches.stream(0, (args.warmup + args.rollouts) * steps)
        for _ in range(args.warmup * steps):
            trainer.training_step(stream)
        device.wait()
        device.forget_peak()
        found: dict[str, list[float]] = {"whole": [], "rollout_seconds": [], "sampling_seconds": []}
        for _ in range(args.rollouts):
            start = time.perf_counter()
            rows = [trainer.training_step(stream) for _ in range(steps)]
            device.wait()
            found["whole"].append(time.perf_counter() - start)
            for name in ("rollout_seconds", "sampling_seconds"):
                found[name].append(rows[0][name])
        images = trainer.arithmetic.images
    whole, rollout, sampling = (float(np.median(values)) for values in found.values())
    shares = {"drawing": sampling / whole, "rewards": (rollout - sampling) / whole, "learning": 1 - rollout / whole}
    return {
        "images_per_second": images / whole,
        "images": images,
        "rollout_seconds": rollout,
        "share": {name: round(value, 4) for name, value in shares.items()},
        "peak_gb": device.peak_gb(),
    }


def run_all(args: argparse.Namespace, device: Device) -> list[dict[str, Any]]:
    """Every row."""
    torch.manual_seed(0)
    types = {"bf16": torch.bfloat16, "no": torch.float32}
    family = drawing_family(args.model, device.device, types[args.precision], types[args.vae_precision])
    rows = []
    for case in itertools.starmap(Case, itertools.product(args.methods, args.resolutions, args.batch_sizes)):
        rows.append(vars(case) | attempt(measure, case, family, device, args))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", help="or a folder or bundled name, for its shapes")
    parser.add_argument("--methods", nargs="+", default=["awm", "nft"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[1024])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[4], help="images drawn and learnt from at once")
    parser.add_argument("--prompts", type=int, default=4, help="of a rollout")
    parser.add_argument("--images_per_prompt", type=int, default=8)
    parser.add_argument("--inference_steps", type=int, default=10)
    parser.add_argument("--train_steps", type=int, default=6, help="forward passes of training for each image")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--reward", default="jpeg_compressibility")
    parser.add_argument("--decode_batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of every row")
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16")
    parser.add_argument("--vae_precision", choices=["bf16", "no"], default="bf16", help="of the decoder")
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rollouts before them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--out", type=Path, help="JSON file that the record is added to")
    args = parser.parse_args(words)
    args.settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in args.set)}
    return args


def main() -> None:
    args = parse()
    device = Device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    record = about(device.device) | {
        "model": args.model,
        "settings": {**run_settings(args), "vae": args.vae_precision},
        "rollouts": args.rollouts,
    }
    record["rows"] = run_all(args, device)
    print(table(RATE_HEAD, [rate_row(row) for row in record["rows"]]))
    if args.out:
        add_record(args.out, record)


if __name__ == "__main__":
    main()
