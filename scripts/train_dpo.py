"""Align a text-to-image model with Diffusion-DPO on preference pairs. Copy this file and change what you like.

python scripts/train_dpo.py --config shapes-dpo
accelerate launch scripts/train_dpo.py --config sdxl-dpo-1x24gb --dataset_name PAIRS --output_dir runs/mine
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.trainers.dpo import DPOConfig, DPOTrainer


def main() -> None:
    config = parse_args(DPOConfig, description=__doc__)

    # The config is a plain dataclass. What it can say can be said here too:
    #   config = dataclasses.replace(config, learning_rate=2e-5, rank=32)
    trainer = DPOTrainer(config)

    # To change the method, subclass the trainer: loss(errors) is all of Diffusion-DPO, and
    # diffalign.trainers.dpo.preference_loss the objective as a function of tensors.
    trainer.train()


if __name__ == "__main__":
    sys.exit(guard(main))
