#!/usr/bin/env python
"""The work of each block of SDXL's denoiser in a forward pass of one image, counted without weights.

python benchmarks/sdxl_blocks.py --resolution 1024
"""

from __future__ import annotations

import argparse
import re

import torch
from bench_record import table
from torch.utils.flop_counter import FlopCounterMode

from diffalign.pipelines.skeleton import Skeleton, find_configs


def count(resolution: int) -> dict[str, float]:
    """TFLOP of each block, and of the whole under ""."""
    skeleton = Skeleton(find_configs("", like="sdxl"))
    family, denoiser = skeleton.family, skeleton.denoiser()
    with torch.device("meta"):
        latents = torch.empty(1, *family.latent_shape(resolution, resolution))
        text = {name: torch.empty(1, *shape) for name, shape in family.text_shapes.items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            family.predict(denoiser, latents, torch.zeros(1), text)
    name = type(denoiser).__name__
    found = {path: sum(kinds.values()) / 1e12 for path, kinds in counter.get_flop_counts().items()}
    blocks = [
        block for block, _ in denoiser.named_modules() if re.fullmatch(r"(down|up)_blocks\.\d+|mid_block", block)
    ]
    return {"": found[name]} | {block: found[f"{name}.{block}"] for block in blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024)
    args = parser.parse_args()
    found = count(args.resolution)
    rows = [[name or "all", f"{value:.3f}", f"{100 * value / found['']:.1f} %"] for name, value in found.items()]
    print(table(("block", "TFLOP", "share"), rows))


if __name__ == "__main__":
    main()
