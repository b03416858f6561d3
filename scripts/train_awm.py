"""Align a text-to-image model with AWM to any reward: its own training loss, by advantage. Copy and change this file.

python scripts/train_awm.py --config shapes-awm
accelerate launch scripts/train_awm.py --config sdxl-awm-1x24gb --prompts prompts.txt --output_dir runs/mine
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.trainers.awm import AWMConfig, AWMTrainer


def main() -> None:
    config = parse_args(AWMConfig, description=__doc__)
    trainer = AWMTrainer(config)

    # To change the objective, subclass the trainer: compute_loss(batch) takes B images of a rollout as clean latents,
    # with the advantage of each; diffalign.trainers.awm.matching_log_prob is what stands for their log-probability.
    trainer.train()


if __name__ == "__main__":
    sys.exit(guard(main))
