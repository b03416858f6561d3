"""Align a text-to-image model with MaPO on preference pairs, without a reference model. Copy and change this file.

python scripts/train_mapo.py --config shapes-mapo
accelerate launch scripts/train_mapo.py --config sdxl-mapo-1x24gb --dataset_name PAIRS --output_dir runs/mine
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.trainers.mapo import MaPOConfig, MaPOTrainer


def main() -> None:
    config = parse_args(MaPOConfig, description=__doc__)
    trainer = MaPOTrainer(config)

    # To change the objective, subclass the trainer: loss(errors) takes the errors of both images of a pair and returns
    # the loss of each pair. diffalign.trainers.mapo.mapo_loss is the objective as a function of tensors.
    trainer.train()


if __name__ == "__main__":
    sys.exit(guard(main))
