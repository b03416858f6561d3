#!/usr/bin/env python
"""Does the best against the worst get worse as k grows, and the best against mu - 2 sigma not? On the shapes world.

    python benchmarks/shapes_selection.py --ks 4 16 32 --seeds 0 1 2 --out benchmarks/results/shapes_selection.json

Draws k images of each training prompt with the base model (the first k of the largest k, so they are shared), scores
them by the simulated annotators, chooses one pair a prompt in both ways, and trains Diffusion-DPO on each set with its
recipe: the same prompts, number of pairs and steps. Held-out prompts and judges are those of shapes_methods.py, whose
records these are, with ``select`` and ``k``. A record that is there is kept and its run not repeated. Flags that are
not known here go to training (--max_train_steps 100).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from shapes_methods import base_judgement, measure, write

from diffalign.app import console
from diffalign.evaluation.shapes import GUIDANCE, STEPS, Judgement, heldout_prompts
from diffalign.making.pairs import PairsConfig, run_pairs

SELECTIONS = ("best-worst", "best-sigma")
JUDGE = "shapes-annotator"
OTHER = "shapes-checker"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ks", nargs="+", type=int, default=[4, 16, 32], help="images a prompt")
    parser.add_argument("--select", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=512, help="training prompts, one pair each")
    parser.add_argument("--images", type=int, default=1024, help="held-out prompts, one image each and model")
    parser.add_argument("--inference_steps", type=int, default=STEPS, help="denoising steps of the training images")
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes_selection"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the records are added to")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a record")
    args, more = parser.parse_known_args()

    records: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    have = {key(record) for record in records}
    prompts = heldout_prompts(args.images)
    base: Judgement | None = None
    console.set_up()
    # The largest first: the others are parts of it.
    for k in sorted(args.ks, reverse=True):
        for select in args.select:
            data = make(select, k, args)
            for seed in args.seeds:
                if (select, k, seed) in have and not args.again:
                    print(f"{select} of {k}, seed {seed}: has a record")
                    continue
                base = base or base_judgement(prompts, args.runs)
                record = measure("dpo", seed, str(data), args.runs, prompts, base, more)
                record |= {"select": select, "k": k, **describe(data)}
                records = [r for r in records if key(r) != (select, k, seed)] + [record]
                write(args.out, records)
                print(json.dumps({name: record[name] for name in ("select", "k", "seed", "win_rate_annotator")}))


def key(record: dict[str, Any]) -> tuple[str, int, int]:
    """What tells records apart."""
    return record["select"], record["k"], record["seed"]


def make(select: str, k: int, args: argparse.Namespace) -> Path:
    """The pairs of one selection among k images a prompt."""
    return run_pairs(
        PairsConfig(
            pretrained_model_name_or_path="shapes-sdxl",
            prompts_file="shapes-train",
            max_prompts=args.prompts,
            num_images_per_prompt=k,
            num_inference_steps=args.inference_steps,
            guidance_scale=GUIDANCE,
            batch_size=32,
            rewards=[JUDGE, {"reward": OTHER, "eval_only": True}],
            select=select,  # type: ignore[arg-type]
            output_dir=str(args.runs / "pairs"),
            split=f"{select}-{k}",
        )
    )


def describe(data: Path) -> dict[str, float]:
    """What the pairs are like: how many, how far apart, how good each half is by both judges."""
    table = pq.read_table(data, columns=["margin", "scores"]).to_pydict()
    scores = [json.loads(text) for text in table["scores"]]
    means = {
        f"{name}_{half}": round(sum(row[scorer][i] for row in scores) / len(scores), 4)
        for name, scorer in (("annotator", JUDGE), ("checker", OTHER))
        for i, half in enumerate(("chosen", "rejected"))
    }
    return {"pairs": len(scores), "mean_gap": round(sum(table["margin"]) / len(scores), 4), **means}


if __name__ == "__main__":
    main()
