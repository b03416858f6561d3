#!/usr/bin/env python
"""What a step of LCD and RG-LCD takes beside a bare loop of the same method: time and memory, side by side.

    python benchmarks/distil_step.py --out benchmarks/results/distil_step.json

Ways: ``lcd``, ``rg_lcd`` and ``rg_lcd-proxy``, of the shapes recipes of these names, each against its loop in
``bare_distil.py`` at the same batch. Steps are taken in turns in one process, so both meet the same machine;
what is reported of time is the median over rounds of the ratio. Memory is the peak of steps in a process that does
nothing else: on a CPU what is resident of it, with the libraries. ``python benchmarks/render_results.py`` makes a
table of the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_distil import BareLCD, BareProxy, BareRGLCD
from bench_record import about
from safetensors.torch import load_file, save_file
from sdxl_step import Device

from diffalign.config import from_dict, load_yaml
from diffalign.recipes import find
from diffalign.trainers import load_method

WAYS: dict[str, tuple[str, type[BareLCD]]] = {
    "lcd": ("shapes-lcd", BareLCD),
    "rg_lcd": ("shapes-rg_lcd", BareRGLCD),
    "rg_lcd-proxy": ("shapes-rg_lcd-proxy", BareProxy),
}
SIDES = ("bare", "loop")
Step = Callable[[], Any]


def settings(way: str, folder: Path, batch_size: int, **more: Any) -> dict[str, Any]:
    """Those of a recipe, without what happens between steps."""
    quiet = {"report_to": ["none"], "checkpointing_steps": 0, "validation_prompts": None, "heldout_prompts": None}
    own = load_yaml(find(WAYS[way][0]))
    own |= {name: value for name, value in quiet.items() if name in own or name == "report_to"}
    own |= {"train_batch_size": batch_size, "max_train_samples": batch_size, "cache_dir": str(folder / "cache")}
    if own.get("proxy_batch_size"):
        own["proxy_batch_size"] = min(own["proxy_batch_size"], batch_size)
    return own | {"output_dir": str(folder / way), "overwrite_output_dir": True} | more


def make_trainer(own: dict[str, Any]) -> Any:
    """The trainer of a method's settings."""
    config_class, trainer_class = load_method(own["method"])
    return trainer_class(from_dict(config_class, own, "distil_step"))


def make_bare(way: str, own: dict[str, Any], batch: Path, device: torch.device) -> BareLCD:
    """The bare loop on a batch that :func:`keep_batch` kept."""
    config_class, _ = load_method(own["method"])
    prompts = json.loads(batch.with_suffix(".json").read_text())
    return WAYS[way][1](from_dict(config_class, own, "distil_step"), load_file(batch), prompts, device)


def keep_batch(trainer: Any, path: Path) -> None:
    """Write a trainer's first batch for :func:`make_bare`."""
    batch = next(trainer.batches.stream(0, 1))
    text, nothing, count = batch.text(), trainer.unconditional, len(batch.latents)
    tensors = {name: getattr(batch, name) for name in ("latents", "noise", "timesteps", "previous", "w", "sizes")}
    tensors |= {"text": text["prompt_embeds"], "pooled": text["pooled_prompt_embeds"]}
    for name, part in (("no_text", "prompt_embeds"), ("no_pooled", "pooled_prompt_embeds")):
        tensors[name] = nothing[part].expand(count, *nothing[part].shape[1:])
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(batch.prompts))


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a way, bare and not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = settings(way, folder, args.batch_size)
        batch = folder / "batch.safetensors"
        keep_batch(make_trainer(own), batch)
        # First: each peak has its own process, and this one is small yet.
        peaks = {side: peak_of(way, side, folder, args) for side in SIDES}
        steps = {side: step_of(way, side, folder, args) for side in SIDES}
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.warmup + args.rounds):
            for side, step in steps.items():
                start = time.perf_counter()
                step()
                Device(args.device).wait()
                times[side].append(time.perf_counter() - start)
    taken = {side: np.array(values[args.warmup :]) for side, values in times.items()}
    low, middle, high = np.percentile(taken["loop"] / taken["bare"], [25, 50, 75])
    return {
        **{f"{side}_seconds": round(float(np.median(values)), 4) for side, values in taken.items()},
        "ratio": round(float(middle), 3),
        "ratio_quartiles": [round(float(low), 3), round(float(high), 3)],
        **{f"{side}_peak_mib": round(peak * 1e9 / 2**20) for side, peak in peaks.items()},
    }


def step_of(way: str, side: str, folder: Path, args: argparse.Namespace) -> Step:
    """What takes one step."""
    own = settings(way, folder, args.batch_size)
    if side == "bare":
        return make_bare(way, own, folder / "batch.safetensors", torch.device(args.device)).step
    trainer = make_trainer(own)
    stream = trainer.batches.stream(0, args.warmup + args.rounds)
    return lambda: trainer.training_step(stream)


def peak_of(way: str, side: str, folder: Path, args: argparse.Namespace) -> float:
    """Peak memory of steps in a process of their own, in 10^9 bytes."""
    command = [sys.executable, __file__, "--peak", way, side, str(folder), "--batch_size", str(args.batch_size)]
    command += ["--device", args.device, "--threads", str(args.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(args: argparse.Namespace) -> None:
    """The other side of :func:`peak_of`: one step to warm up, then two that count."""
    way, side, folder = args.peak
    args.warmup, args.rounds = 1, 2
    device, step = Device(args.device), step_of(way, side, Path(folder), args)
    step()
    device.wait()
    device.forget_peak()
    step()
    step()
    device.wait()
    print(device.peak_gb())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", nargs=3, metavar=("WAY", "SIDE", "FOLDER"), help="print the memory of one; internal")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print_peak(args)
        return
    result = {
        "ways": {way: measure(way, args) for way in args.ways},
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        **about(torch.device(args.device)),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
