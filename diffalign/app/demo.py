"""``diffalign demo``: the whole way, from pairs to a grid, on the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffalign import recipes
from diffalign.config import field, from_dict, load_yaml, parse_args
from diffalign.errors import UserError


@dataclass(kw_only=True)
class DemoConfig:
    """Align the bundled model on the bundled preference pairs with Diffusion-DPO."""

    output_dir: str = field("runs/demo", help="Folder that the demo writes; a finished one is used again.")
    seed: int = field(0, help="Seed of training and of the images.")
    max_train_steps: int | None = field(None, help="Optimiser steps. Default: those of the recipe shapes-dpo.")

    def __post_init__(self) -> None:
        if self.max_train_steps is not None and self.max_train_steps < 1:
            raise UserError(f"max_train_steps must be at least 1, got {self.max_train_steps}")


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    run_demo(parse_args(DemoConfig, argv, prog="diffalign demo"))
    return 0


def run_demo(config: DemoConfig) -> None:
    """Train the recipe ``shapes-dpo`` with the demo's seed and folder."""
    from diffalign.trainers.dpo import DPOConfig, DPOTrainer

    values = load_yaml(recipes.find("shapes-dpo")) | {"output_dir": config.output_dir, "seed": config.seed}
    if config.max_train_steps is not None:
        values["max_train_steps"] = config.max_train_steps
    DPOTrainer(from_dict(DPOConfig, values, "shapes-dpo")).train()
