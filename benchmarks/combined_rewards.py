#!/usr/bin/env python
"""Who decides when rewards are added? The table of docs/combining-rewards.md.

    python benchmarks/combined_rewards.py

Scores both images of bundled training pairs by three rewards and combines them in several ways. A cell says how often
the total prefers the same image as one reward does, of the pairs that both decide.
"""

from __future__ import annotations

import argparse
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.readers import PairSource, open_pairs
from diffalign.data.write import image_bytes
from diffalign.rewards import load_rewards

REWARDS = ("shapes-clip", "shapes-aesthetic", "shapes-checker")
WAYS = {"sum": ("sum", None), "sum, all zscore": ("sum", "zscore"), "lsc": ("lsc", None), "vote": ("vote", None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400, help="pairs, from the first on")
    count = parser.parse_args().pairs
    source = open_pairs("shapes-pairs")
    assert isinstance(source, PairSource)
    pairs = [source[i] for i in range(count)]
    files = [io.BytesIO(image_bytes(image)) for p in pairs for image in (p.chosen, p.rejected)]
    pictures = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
    images = pictures.permute(0, 3, 1, 2).float() / 255
    prompts = [p.prompt for p in pairs for _ in range(2)]
    groups = [i for i in range(count) for _ in range(2)]

    columns = {}
    for way, (mode, transform) in WAYS.items():
        specs = [{"reward": name, "transform": transform} for name in REWARDS]
        columns[way] = load_rewards(specs, mode=mode)(images, prompts, group_ids=groups)  # type: ignore[arg-type]
    plain = columns["sum"].raw
    print(f"| | spread within pairs | {' | '.join(f'`{way}`' for way in WAYS)} | decides |")
    print("|---|" + "---|" * (len(WAYS) + 2))
    for name in REWARDS:
        own = plain[name].rewards.reshape(-1, 2)
        agree = [agreement(own, found.total.reshape(-1, 2)) for found in columns.values()]
        spread = own.std(1, unbiased=False).mean()
        decided = (own[:, 0] != own[:, 1]).float().mean()
        print(f"| {name} | {spread:.2f} | {' | '.join(f'{share:.2f}' for share in agree)} | {decided:.2f} |")


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of pairs (N, 2) that both decide in which both prefer the same."""
    signs = torch.sign(a[:, 0] - a[:, 1]) * torch.sign(b[:, 0] - b[:, 1])
    return float((signs[signs != 0] > 0).float().mean())


if __name__ == "__main__":
    main()
