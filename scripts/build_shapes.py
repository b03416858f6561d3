#!/usr/bin/env python
"""Build the bundled models and data of the shapes world, from nothing but a seed.

    python scripts/build_shapes.py --work runs/shapes            # resumes where it stopped
    python scripts/build_shapes.py --work runs/shapes --device cuda

Stages: vae, denoiser (UNet and text encoders), clip (with the aesthetic head), pairs. A stage whose output is
there is not run again. ``--install`` copies the results into the package.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for states, samples and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    from diffalign.shapes.building.denoiser import train_denoiser
    from diffalign.shapes.building.vae import train_vae

    vae = train_vae(args.work / "vae", args.work, args.seed, args.device)
    train_denoiser(args.work / "shapes-sdxl", vae, args.work, args.seed, args.device)


if __name__ == "__main__":
    main()
