"""``diffalign demo``: align the bundled model with Diffusion-DPO on the bundled pairs, and report what changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.app import console
from diffalign.config import field, from_dict, load_yaml, parse_args
from diffalign.errors import UserError
from diffalign.recipes import find

_GUIDANCE = [1.0, 2.0, 5.0]
_IMAGES = 2


@dataclass(kw_only=True)
class DemoConfig:
    """Align the small bundled SDXL pipeline with Diffusion-DPO on bundled preference pairs, on a CPU, in minutes.

    Ends with the report of `diffalign eval` on held-out prompts: win rates, what they cost in diversity, and a page of
    all images.
    """

    output_dir: Path = field(Path("runs/demo"), help="Folder for the run and the report.")
    overwrite: bool = field(False, help="Run again where the folder holds an earlier demo.")
    num_prompts: int = field(64, help="Held-out prompts to compare on; more make the intervals narrower.")
    seed: int = field(0, help="Seed of the training run.")
    max_train_steps: int | None = field(None, help="Fewer steps for a quicker look. Default: the recipe's.")

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise UserError(f"num_prompts must be at least 1, got {self.num_prompts}")


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    run(parse_args(DemoConfig, list(argv), prog="diffalign demo"))
    return 0


def run(config: DemoConfig) -> Path:
    """Train, draw, judge; returns the report's path."""
    from diffalign.evaluation.evaluate import EvalConfig, run_eval

    console.set_up(logging.ERROR)
    start = time.monotonic()
    print("1/2  train a LoRA with Diffusion-DPO (diffalign train dpo --config shapes-dpo)\n", flush=True)
    run_dir = _train(config)
    per_model = config.num_prompts * _IMAGES * len(_GUIDANCE)
    print(
        f"\n2/2  draw {per_model} images with each model, same prompts and seeds, and judge them "
        "(diffalign eval --config shapes-eval)\n",
        flush=True,
    )
    settings = load_yaml(find("shapes-eval")) | {
        "models": [f"dpo={run_dir}"],
        "runs": [str(run_dir)],
        "output_dir": str(config.output_dir / "report"),
        "overwrite_output_dir": config.overwrite,
        "max_prompts": config.num_prompts,
        "num_images_per_prompt": _IMAGES,
        "guidance_scales": _GUIDANCE,
        "html": "inside",
        "title": "The bundled model, aligned by DPO",
    }
    result = run_eval(from_dict(EvalConfig, settings, "shapes-eval"))
    assert result is not None, "the demo is one process"
    print(f"\nLoRA    {run_dir}\nreport  {result.report}\nimages  {result.report.with_name('images.html')}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    return result.report


def _train(config: DemoConfig) -> Path:
    from diffalign.trainers.dpo import DPOConfig, DPOTrainer

    settings = load_yaml(find("shapes-dpo")) | {
        "output_dir": str(config.output_dir / "run"),
        "overwrite_output_dir": config.overwrite,
        "seed": config.seed,
    }
    if config.max_train_steps is not None:
        settings["max_train_steps"] = config.max_train_steps
    return DPOTrainer(from_dict(DPOConfig, settings, "shapes-dpo")).train()
