#!/usr/bin/env python
"""Does a method's result depend on the guidance that images are drawn with? On the shapes world, held-out prompts.

    python benchmarks/shapes_methods.py --methods dpo sft --out benchmarks/results/shapes_methods.json
    python benchmarks/shapes_guidance.py --methods dpo sft --guidance 1 --out benchmarks/results/shapes_guidance.json

Draws what shapes_methods.py has trained (``--runs``) at other scales than its table's, and the base model at the same
scale, same prompts and seeds. The pairs' images are the base model's own, drawn with guidance: a model that learns to
draw such images by itself needs less of it. A record that is there is kept. ``python benchmarks/render_results.py``
makes a table of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shapes_methods import LIBRARIES, base_judgement

from diffalign.app import console
from diffalign.config import write_text
from diffalign.evaluation.shapes import STEPS, compare, draw, heldout_prompts, judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0])
    parser.add_argument("--images", type=int, default=1024, help="held-out prompts, one image each and model")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/shapes_methods"), help="what shapes_methods.py trained"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the records are added to")
    args = parser.parse_args()

    records: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    have = set(map(key, records))
    prompts = heldout_prompts(args.images)
    console.set_up()
    for name in [(m, s, g) for g in args.guidance for m in args.methods for s in args.seeds]:
        if name in have:
            print(*name, "has a record")
            continue
        method, seed, guidance = name
        run = args.runs / f"{method}-{seed}"
        if not (run / "pytorch_lora_weights.safetensors").exists():
            raise SystemExit(f"{run} has no LoRA: train it first, with shapes_methods.py --methods {method}")
        base = base_judgement(prompts, args.runs, guidance)
        aligned = judge(draw(prompts, lora=run, guidance=guidance, progress=" ".join(map(str, name))), prompts)
        record = {
            "method": method,
            "seed": seed,
            "guidance": guidance,
            "images": len(prompts),
            "inference_steps": STEPS,
            "base_checker_score": round(float(base.checker.mean()), 4),
            "checker_score": round(float(aligned.checker.mean()), 4),
            **{
                f"win_rate_{by}": [round(x, 4) for x in (r.rate, r.low, r.high)]
                for by, r in compare(aligned, base).items()
            },
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
            "versions": {name: version(name) for name in LIBRARIES},
        }
        records = sorted([*records, record], key=key)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(records, indent=1) + "\n")
        print(json.dumps({k: record[k] for k in ("method", "seed", "guidance", "win_rate_annotator")}))


def key(record: dict[str, Any]) -> tuple[str, int, float]:
    """What tells records apart."""
    return record["method"], record["seed"], record["guidance"]


if __name__ == "__main__":
    main()
