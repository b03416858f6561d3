#!/usr/bin/env python
"""A training step at SDXL's real size, with random weights, beside the plain loop in the same run.

    python benchmarks/sdxl_step.py --methods dpo mapo awm --resolutions 1024 512 --batch_sizes 1 2 4 \\
        --checkpointing none selective full --modes eager compiled --out benchmarks/results/sdxl_step.json
    python benchmarks/sdxl_step.py --batch_sizes 1 --checkpointing full --cap_gb 24
    python benchmarks/sdxl_step.py --device cpu --resolutions 256 --steps 1 --warmup 0

Every row is a run of the method's own trainer (``training_step``) on a cache of random latents and embeddings, read
from disk. The plain loop (``plain_loop.py``) is measured beside it for Diffusion-DPO and MaPO, at the same batch, rank
and kind of checkpointing. Where a row runs out of memory it says so. TFLOP/s are all that a step computes,
recomputation included, beside what the same device reaches in a large matrix product. Records are added to the file.
Methods on rewards are measured without drawing; with it by ``rl_rate.py``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench_record import about, add_record, table
from plain_loop import PlainLoop
from sdxl_model import random_family, synthetic_trainer
from speed_tables import STEP_HEAD, step_row
from torch.utils.flop_counter import FlopCounterMode

from diffalign.errors import UserError
from diffalign.pipelines.base import Family

SELECTIVE = ["down_blocks.2", "mid_block", "up_blocks.0"]
"""The blocks of ten transformer layers each: over half of the memory (docs/speed.md)."""
PLAIN = {"dpo": True, "mapo": False}
"""Methods with a plain loop, and whether it has a reference."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    method: str
    resolution: int
    batch_size: int
    rank: int
    checkpointing: str
    mode: str

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """Of the method's config."""
        return {
            "resolution": self.resolution,
            "train_batch_size": self.batch_size,
            "rank": self.rank,
            "mixed_precision": args.precision,
            "gradient_checkpointing": self.checkpointing != "none",
            "checkpointed_blocks": args.blocks if self.checkpointing == "selective" else None,
            "compile_repeated_blocks": self.mode == "compiled",
            **args.settings,
        }


class Device:
    """What differs between CUDA and a CPU in measuring."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"

    def wait(self) -> None:
        """Until all that was started is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Start looking for the largest memory anew. Of a CPU's process this is what is resident."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak_gb(self) -> float:
        """The largest memory since, in 10^9 bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9

    def ceiling(self) -> float:
        """TFLOP/s of a large square matrix product in bfloat16: the best of ten."""
        n = 8192 if self.cuda else 2048
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        best = float("inf")
        for _ in range(10):
            self.wait()
            start = time.perf_counter()
            a @ b
            self.wait()
            best = min(best, time.perf_counter() - start)
        return 2 * n**3 / best / 1e12


@contextmanager
def phases(trainer: Any, device: Device) -> Iterator[dict[str, float]]:
    """Seconds of a trainer's forward and backward passes and of its optimiser while the context lasts, everything in
    between waited for."""
    seconds = {"forward": 0.0, "backward": 0.0, "optimiser": 0.0}

    def timed(run: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            device.wait()
            start = time.perf_counter()
            result = run(*args, **kwargs)
            device.wait()
            seconds[phase] += time.perf_counter() - start
            return result

        return call

    trainer.compute_loss = timed(trainer.compute_loss, "forward")
    trainer.accelerator.backward = timed(trainer.accelerator.backward, "backward")
    trainer.optimizer.step = timed(trainer.optimizer.step, "optimiser")
    try:
        yield seconds
    finally:
        del trainer.compute_loss, trainer.accelerator.backward, trainer.optimizer.step


def count_tflop(trainer: Any, stream: Iterator[Any]) -> float:
    """What one step computes, in TFLOP; counted uncompiled, since the counter sees no compiled operation."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        trainer.training_step(stream)
    return counter.get_total_flops() / 1e12


def measure(case: Case, family: Family, device: Device, args: argparse.Namespace) -> dict[str, Any]:
    """One row, of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = synthetic_trainer(case.method, family, Path(folder), **case.settings(args))
        stream = trainer.batches.stream(0, 1_000_000)
        for _ in range(args.warmup):
            trainer.training_step(stream)
        device.wait()
        device.forget_peak()
        rows = [trainer.training_step(stream) for _ in range(args.steps)]
        peak = device.peak_gb()
        with phases(trainer, device) as seconds:
            shared = [trainer.training_step(stream) for _ in range(args.steps)]
        tflop = count_tflop(trainer, stream)
        samples = trainer.plan.effective_batch
        stream.close()  # type: ignore[attr-defined]
    step = float(np.median([row["step_seconds"] for row in rows]))
    whole = sum(row["step_seconds"] for row in shared)
    shares = {name: value / whole for name, value in seconds.items()}
    shares["data"] = sum(row["data_seconds"] for row in shared) / whole
    return {
        "samples_per_second": samples / step,
        "step_seconds": step,
        "peak_gb": peak,
        "share": {name: round(value, 4) for name, value in (shares | {"rest": 1 - sum(shares.values())}).items()},
        "waiting_for_data": float(np.median([row["data_seconds"] / row["step_seconds"] for row in rows])),
        "tflop_per_step": tflop,
        "tflop_per_second": tflop / step,
    }


def measure_plain(case: Case, family: Family, device: Device, args: argparse.Namespace) -> dict[str, Any]:
    """The same of the plain loop."""
    loop = PlainLoop(
        family,
        reference=PLAIN[case.method],
        batch_size=case.batch_size,
        resolution=case.resolution,
        rank=case.rank,
        checkpointing=case.checkpointing == "full",
    )
    for _ in range(args.warmup):
        loop.step()
    device.wait()
    device.forget_peak()
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        loop.step()
        device.wait()
        times.append(time.perf_counter() - start)
    step = float(np.median(times))
    return {"samples_per_second": case.batch_size / step, "step_seconds": step, "peak_gb": device.peak_gb()}


def as_new(family: Family) -> None:
    """Take off the denoiser what a run put on it."""
    denoiser: Any = family.denoiser
    if hasattr(denoiser, "peft_config"):
        denoiser.unload_lora()
    denoiser.disable_gradient_checkpointing()
    for module in denoiser.modules():
        module._compiled_call_impl = None
    denoiser.to(memory_format=torch.contiguous_format).requires_grad_(False)
    torch.compiler.reset()
    gc.collect()
    if family.device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(run: Callable[..., dict[str, Any]], case: Case, family: Family, *rest: Any) -> dict[str, Any]:
    """A row, or that it ran out of memory."""
    try:
        return run(case, family, *rest)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        as_new(family)


def run_all(args: argparse.Namespace, device: Device) -> list[dict[str, Any]]:
    """Every row, with the plain loop's beside those that have one."""
    torch.manual_seed(0)
    family = random_family(args.model, device.device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    plain: dict[Case, dict[str, Any]] = {}
    rows = []
    axes = (args.methods, args.resolutions, args.batch_sizes, args.ranks, args.checkpointing, args.modes)
    for case in itertools.starmap(Case, itertools.product(*axes)):
        found = vars(case) | attempt(measure, case, family, device, args)
        if case.method in PLAIN and not args.no_plain:
            kind = "none" if case.checkpointing == "none" else "full"
            other = Case(case.method, case.resolution, case.batch_size, case.rank, kind, "eager")
            if other not in plain:
                plain[other] = attempt(measure_plain, other, family, device, args)
            found["plain"] = plain[other]
            rates = [row.get("samples_per_second") for row in (found, plain[other])]
            found["ratio_to_plain"] = rates[0] / rates[1] if all(rates) else None
        rows.append(found)
        print(json.dumps(found), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", help="or a folder or bundled name, for its shapes")
    parser.add_argument("--methods", nargs="+", default=["dpo", "mapo", "awm"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[1024])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--checkpointing", nargs="+", choices=["none", "selective", "full"], default=["none"])
    parser.add_argument("--blocks", nargs="+", default=SELECTIVE, help="what selective checkpointing recomputes")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of every row")
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--cap_gb", type=float, help="let no more of the card's memory be used, in 10^9 bytes")
    parser.add_argument("--no_plain", action="store_true", help="leave the plain loop out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--out", type=Path, help="JSON file that the record is added to")
    args = parser.parse_args()
    args.settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in args.set)}
    device = Device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cap_gb:
        if not device.cuda:
            raise UserError("--cap_gb is for CUDA")
        torch.cuda.set_per_process_memory_fraction(
            args.cap_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory
        )
    record = about(device.device) | {
        "model": args.model,
        "cap_gb": args.cap_gb,
        "settings": args.settings,
        "steps": args.steps,
    }
    record["ceiling_tflop_per_second"] = device.ceiling()
    record["rows"] = run_all(args, device)
    print(table(STEP_HEAD, [step_row(row, record["ceiling_tflop_per_second"]) for row in record["rows"]]))
    if args.out:
        add_record(args.out, record)


if __name__ == "__main__":
    main()
