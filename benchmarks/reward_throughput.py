#!/usr/bin/env python
"""Throughput of CLIP-size rewards against a bare forward of their image tower at the same batch.

    python benchmarks/reward_throughput.py --out benchmarks/results/reward_throughput.json

A reward does all it does in use: checks of the images, resizing, normalising, the tower, prompts (embedded once and
then remembered, as in training, where each prompt has many images), dot products, scores. The bare forward is the
tower alone on pixels of the right size that are ready in memory. Weights are random, since time does not depend on
them. Calls are taken in turns, so both meet the same machine, and the order changes from turn to turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from diffalign.rewards import Reward
from diffalign.rewards.aesthetic import Aesthetic, AestheticHead
from diffalign.rewards.clip import CosineReward, PickScore
from diffalign.rewards.clipscore import CLIPScore
from diffalign.rewards.encoders import TransformersEncoder
from diffalign.rewards.hps import HPSv21
from diffalign.rewards.open_clip_encoder import OpenClipEncoder, architecture, clip_config
from diffalign.rewards.pixels import Preprocess

PROMPTS = ["a red circle to the left of a blue square", "an oil painting of a lighthouse in a storm, golden light"]


class Words:
    """CLIP's tokens in the form that transformers' tokenizers return, without a file of a vocabulary."""

    def __init__(self) -> None:
        self.tokenizer = open_clip.SimpleTokenizer()

    def __call__(self, prompts: list[str], **options: Any) -> Any:
        ids = self.tokenizer(prompts)
        return type("Encoding", (), {"input_ids": ids})()


def clip(name: str) -> CLIPModel:
    """A CLIP of the size of open_clip's model of this name, with random weights."""
    return CLIPModel(clip_config(architecture(name))).eval().requires_grad_(False)


def with_encoder(reward: CosineReward, encoder: Any) -> CosineReward:
    reward.make_encoder = lambda: encoder  # type: ignore[method-assign]
    reward.prepare()
    return reward


def scorers(size: str, device: str, dtype: torch.dtype) -> dict[str, tuple[Reward, Callable[[Tensor], Any]]]:
    """Each reward with random weights of a size, and its image tower as a bare function of pixels."""
    options: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": 1024}
    side = architecture(size)["vision_cfg"]["image_size"]
    crop = Preprocess(side, side)
    letterbox = Preprocess(side, side, mode="letterbox", eight_bit=False)
    model = clip(size)
    pick = with_encoder(PickScore(**options), TransformersEncoder(model, crop, Words(), "longest"))
    score = with_encoder(CLIPScore(**options), TransformersEncoder(model, crop, Words(), "longest"))
    theirs = open_clip.CLIP(**architecture(size)).eval().requires_grad_(False)
    hps = with_encoder(HPSv21(**options), OpenClipEncoder(theirs, letterbox, open_clip.SimpleTokenizer()))
    aesthetic = aesthetic_reward(model, crop, options)
    return {
        "pickscore": (pick, lambda pixels: model.get_image_features(pixel_values=pixels)),
        "hpsv2.1": (hps, theirs.encode_image),
        "aesthetic": (aesthetic, lambda pixels: aesthetic.tower(pixel_values=pixels)),
        "clipscore": (score, lambda pixels: model.get_image_features(pixel_values=pixels)),
    }


def aesthetic_reward(model: CLIPModel, preprocess: Preprocess, options: dict[str, Any]) -> Aesthetic:
    config: CLIPConfig = model.config
    config.vision_config.projection_dim = config.projection_dim
    reward = Aesthetic(**options)
    tower = CLIPVisionModelWithProjection(config.vision_config).eval().requires_grad_(False)
    reward.tower = tower.to(reward.device, reward.dtype)
    head = AestheticHead([config.projection_dim, 1024, 128, 64, 16, 1]).eval().requires_grad_(False)
    reward.head, reward.preprocess, reward._loaded = head.to(reward.device), preprocess, True
    return reward


@contextmanager
def waited_for(device: str) -> Iterator[list[float]]:
    """Seconds of what is done inside: to the end of a GPU's work, or of CPU time in all threads of the process.

    CPU time, since it does not count the time in which a shared machine runs other processes.
    """
    seconds: list[float] = []
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    yield seconds
    if device != "cpu":
        torch.cuda.synchronize()
    seconds.append(clock() - start)


def compare(reward: Reward, tower: Callable[[Tensor], Any], images: Tensor, turns: int, warmup: int) -> dict[str, Any]:
    """Medians of both, and of their ratio turn by turn (bare / reward: 1 is no cost)."""
    device = str(reward.device)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(images))]
    side = reward.input_size or 224
    pixels = torch.randn(len(images), 3, side, side, device=reward.device, dtype=reward.dtype)
    times: dict[str, list[float]] = {"bare": [], "reward": []}
    for turn in range(warmup + turns):
        for name in ("bare", "reward") if turn % 2 else ("reward", "bare"):
            with waited_for(device) as seconds, torch.no_grad():
                tower(pixels) if name == "bare" else reward(images, prompts)
            times[name].append(seconds[0])
    bare, whole = (np.array(times[name][warmup:]) for name in ("bare", "reward"))
    return {
        "bare_images_per_second": round(len(images) / float(np.median(bare)), 3),
        "images_per_second": round(len(images) / float(np.median(whole)), 3),
        "ratio": round(float(np.median(bare / whole)), 4),
        "ratio_of_medians": round(float(np.median(bare) / np.median(whole)), 4),
        "turns": turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-L-14", help="size of the towers: a model that open_clip lists")
    parser.add_argument("--rewards", nargs="+", default=["pickscore", "hpsv2.1", "aesthetic", "clipscore"])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=512, help="side of the images that are scored")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="a JSON file; results of other settings in it are kept")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=args.device)
    everything = scorers(args.model, args.device, getattr(torch, args.dtype))
    result: dict[str, Any] = {
        "command": f"python {' '.join(sys.argv)}",
        "model": args.model,
        "batch_size": args.batch_size,
        "resolution": args.resolution,
        "dtype": args.dtype,
        "clock": "CPU time" if args.device == "cpu" else "wall clock",
        "machine": machine(args.device, args.threads),
        "versions": {name: version(name) for name in ("torch", "transformers", "open-clip-torch")},
        "rewards": {name: compare(*everything[name], images, args.turns, args.warmup) for name in args.rewards},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        keep(args.out, result)


def machine(device: str, threads: int) -> str:
    if device != "cpu":
        return str(torch.cuda.get_device_name())
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {threads} threads"


def keep(file: Path, result: dict[str, Any]) -> None:
    """Put a run in place of one with the same settings, beside the others."""
    settings = ("model", "batch_size", "resolution", "dtype", "machine")
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else []
    others = [run for run in runs if any(run[key] != result[key] for key in settings)]
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
        new.write(json.dumps({"runs": [*others, result]}, indent=1) + "\n")
    os.replace(new.name, file)


if __name__ == "__main__":
    main()
