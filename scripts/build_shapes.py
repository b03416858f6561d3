#!/usr/bin/env python
"""Build the bundled models and data of the shapes world, from nothing but a seed.

    python scripts/build_shapes.py --work runs/shapes              # resumes where it stopped
    python scripts/build_shapes.py --work runs/shapes --install    # and puts the results into the package

Stages: VAE; UNet and text encoders; preference pairs; CLIP, contrastively and then on the pairs; aesthetic head. A
stage whose output is there is not run again. States, progress and sample sheets are in the work folder.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

import numpy as np
import torch

from diffalign.assets import BUNDLED, ROOT
from diffalign.shapes.building.aesthetic import train_aesthetic
from diffalign.shapes.building.clip import train_contrastive, train_on_preferences
from diffalign.shapes.building.denoiser import sample, train_denoiser
from diffalign.shapes.building.pairs import make_pairs
from diffalign.shapes.building.vae import train_vae
from diffalign.shapes.scene import sample_captions

LIMIT_MB = 12.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for states, samples and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--install", action="store_true", help="copy the results into the package when they are whole")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "diffusers", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    build(args.work, args.seed, args.device)
    if args.install:
        install(args.work)


def build(work: Path, seed: int, device: str) -> None:
    """Run every stage that has no result yet."""
    vae = train_vae(work / "vae", work, seed, device)
    pipe = train_denoiser(work / "shapes-sdxl", vae, work, seed, device)

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return np.stack([np.asarray(image) for image in sample(pipe, prompts, seeds)])

    pairs = work / "shapes-pairs"
    if not (pairs / "README.md").exists():
        make_pairs(draw, pairs, work, seed)
    train_contrastive(work / "clip-contrastive", work, seed, device)
    train_on_preferences(work / "shapes-clip", work / "clip-contrastive", pairs, work, seed, device)
    if not (work / "shapes-aesthetic" / "config.json").exists():
        prompts = sample_captions(1024, seed + 1)
        samples = torch.from_numpy(draw(prompts, list(range(len(prompts))))).permute(0, 3, 1, 2)
        train_aesthetic(work / "shapes-aesthetic", work / "shapes-clip", samples, work, seed, device)


def install(work: Path) -> None:
    """Copy the results over the bundled ones, if all are there and together small enough to ship."""
    files = [path for name in BUNDLED for path in (work / name).rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    if megabytes > LIMIT_MB:
        raise SystemExit(f"the results take {megabytes:.1f} MB, more than {LIMIT_MB} MB: nothing was installed")
    for name in BUNDLED:
        shutil.rmtree(ROOT / name, ignore_errors=True)
        shutil.copytree(work / name, ROOT / name)
    logging.info("installed %.1f MB into %s", megabytes, ROOT)


if __name__ == "__main__":
    main()
