#!/usr/bin/env python
"""How far the memory that `diffalign estimate` predicts is from what a real step takes, on this machine's CPU.

    python benchmarks/estimate_error.py --out benchmarks/results/estimate_error.json
    python benchmarks/estimate_error.py --published --out benchmarks/results/estimate_error.json

Each case is a process of its own: networks with random weights, one training pass to warm up and one that is measured
by the largest resident set of the process, less that before the pass. It is compared with what the pass adds by the
estimate, for a CPU's rules of autocast and its gradients. The weights of networks are compared by their bytes, which
are exact. The second command brings only the time beside a published one up to date, which measures nothing. Both
errors are stated by `diffalign estimate`: they go into diffalign/estimation/calibration.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

CASES = {
    "shapes, LoRA, batch 64": {"path": "shapes-sdxl", "samples": 64},
    "shapes, LoRA, batch 64, checkpointing": {"path": "shapes-sdxl", "samples": 64, "checkpointing": True},
    "shapes, LoRA, batch 128": {"path": "shapes-sdxl", "samples": 128},
    "shapes, all weights, batch 64": {"path": "shapes-sdxl", "samples": 64, "full": True},
    "shapes, no gradient, batch 128": {"path": "shapes-sdxl", "samples": 128, "grad": False},
    "SD 1.5 at 256, LoRA, batch 1": {"path": "sd15", "samples": 1, "side": 256},
    "SD 1.5 at 256, LoRA, batch 2, checkpointing": {"path": "sd15", "samples": 2, "side": 256, "checkpointing": True},
    "VAE decoder at 256, batch 2": {
        "path": "sd15",
        "samples": 2,
        "side": 256,
        "network": "vae_decoder",
        "grad": False,
    },
    "VAE decoder at 256, batch 1, with gradient": {
        "path": "sd15",
        "samples": 1,
        "side": 256,
        "network": "vae_decoder",
    },
}
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_STATUS = Path("/proc/self/status")


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Predict and measure one case, in this process."""
    import torch

    from diffalign.estimation.tracing import Networks, trace
    from diffalign.estimation.work import Model, Pass

    bundled = case["path"] == "sd15"
    model = Model(
        path=case["path"],
        like="sd15" if bundled else None,
        full=case.get("full", False),
        checkpointed=() if case.get("checkpointing") else None,
        height=case.get("side"),
        width=case.get("side"),
    )
    network = case.get("network", "denoiser")
    one = Pass("measured", network, case["samples"], grad=case.get("grad", True), autocast=False)
    predicted = trace(model, one, "cpu")
    found = Networks(model)
    module = found.denoiser if network == "denoiser" else found.vae
    for parameter in module.parameters():
        parameter.grad = None
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        torch.nn.init.normal_(tensor.data, std=0.02)
    module.train(one.grad)
    if case.get("checkpointing"):
        module.enable_gradient_checkpointing()
    torch.set_default_device("cpu")
    step = real_pass(found, one, model)
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # What glibc hoards is no part of the pass, wherever it comes from.
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    measured = resident("VmHWM") - before
    return {
        "predicted_mib": predicted.peak / 2**20,
        "measured_mib": measured / 2**20,
        "error": predicted.peak / measured - 1,
    }


def published() -> dict[str, float]:
    """The estimate beside a published time: an image of SDXL at 1024 pixels, 30 steps with guidance, bf16, SDPA, not
    compiled, took 3.31 s on an A100 80GB (pytorch.org, "Accelerating Generative AI Part III: Diffusion, Fast")."""
    import torch

    from diffalign.estimation.cards import find_card, load_calibration
    from diffalign.estimation.estimate import seconds_of
    from diffalign.estimation.tracing import trace
    from diffalign.estimation.work import Model, Pass

    model = Model(SDXL, dtype=torch.bfloat16, vae="madebyollin/sdxl-vae-fp16-fix", rank=1)
    card, calibration = find_card("A100 80GB"), load_calibration()
    step = seconds_of(trace(model, Pass("", "denoiser", 2, adapters=False)), card, calibration)
    decode = seconds_of(trace(model, Pass("", "vae_decoder", 1, autocast=False)), card, calibration)
    estimated = 30 * step + decode
    return {"published_seconds": 3.31, "estimated_seconds": estimated, "error": estimated / 3.31 - 1}


def real_pass(found: Any, one: Any, model: Any) -> Any:
    """The pass on real tensors."""
    import torch

    from diffalign.diffusion.error import per_sample_mse

    height, width = found.size(model)
    shape = found.family.latent_shape(height, width)
    latents, target = torch.randn(one.samples, *shape), torch.randn(one.samples, *shape)
    if one.network == "vae_decoder":
        latents.requires_grad_(one.grad)
        call = lambda: found.vae.decode(latents, return_dict=False)[0].mean()  # noqa: E731
    else:
        text = {name: torch.randn(one.samples, *own) for name, own in found.family.text_shapes.items()}
        given = {"timesteps": torch.full((one.samples,), 500), "text": text}
        given["sizes"] = torch.tensor([[height, width, 0, 0, height, width]]).expand(one.samples, 6)
        call = lambda: per_sample_mse(found.family.predict(found.denoiser, latents, **given), target).mean()  # noqa: E731

    def step() -> None:
        with torch.set_grad_enabled(one.grad):
            loss = call()
            if one.grad:
                loss.backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES, help="only this one, in this process")
    parser.add_argument("--published", action="store_true", help="only the time; with --out beside what is there")
    args = parser.parse_args()
    if args.published:
        time = published()
        print(json.dumps(time))
        if args.out:
            args.out.write_text(json.dumps(json.loads(args.out.read_text()) | {"time": time}, indent=1) + "\n")
        return
    if args.case:
        print(json.dumps(measure(CASES[args.case])))
        return
    # Freed memory goes back at once, or the largest resident set would be that of glibc's hoard.
    # Each thread of a CPU's convolution keeps memory of its own to add up gradients of weights, which no card does.
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **own}
    rows = {}
    for name in CASES:
        done = subprocess.run(
            [sys.executable, __file__, "--case", name], env=env, check=True, capture_output=True, text=True
        )
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        row = rows[name]
        print(
            f"{name:<46} {row['predicted_mib']:8.0f} {row['measured_mib']:8.0f} MiB  {row['error']:+.1%}", flush=True
        )
    worst = max(abs(row["error"]) for row in rows.values())
    result = {
        "cases": rows,
        "worst_error": worst,
        "time": published(),
        "command": "python benchmarks/estimate_error.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
    }
    print(f"worst error {worst:.1%}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
