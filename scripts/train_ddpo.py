"""Align a text-to-image model with DDPO to any reward, by drawing images and scoring them. Copy and change this file.

python scripts/train_ddpo.py --config shapes-ddpo
accelerate launch scripts/train_ddpo.py --config sdxl-ddpo-1x24gb --prompts prompts.txt --output_dir runs/mine
python scripts/train_ddpo.py --config sdxl-ddpo-1x24gb --prompts prompts.txt --rewards scripts/custom_reward.py:Warm
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.trainers.ddpo import DDPOConfig, DDPOTrainer


def main() -> None:
    config = parse_args(DDPOConfig, description=__doc__)
    trainer = DDPOTrainer(config)

    # To change the objective, subclass the trainer: compute_loss(batch) takes one sampling step of B images, with what
    # it was drawn from, its log-probability then, and the advantage of the image. To change what an image is worth,
    # change the rewards: a function of images, prompts and metadata in a file of your own, FILE.py:NAME.
    trainer.train()


if __name__ == "__main__":
    sys.exit(guard(main))
