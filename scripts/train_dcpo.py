"""Align a text-to-image model with DCPO: pairs with a caption for each image. Copy this file and change what you like.

diffalign captions shapes-pairs --captioner shapes-checker --output_dir runs/shapes-captions
python scripts/train_dcpo.py --config shapes-dcpo
accelerate launch scripts/train_dcpo.py --config sdxl-dcpo-1x24gb --dataset_name CAPTIONED --output_dir runs/mine
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.trainers.dcpo import DCPOConfig, DCPOTrainer


def main() -> None:
    config = parse_args(DCPOConfig, description=__doc__)
    trainer = DCPOTrainer(config)

    # The objective is that of diffalign.trainers.dpo; what differs is the captions that the batches carry. With a
    # subclass whose ``captions`` is "prompt" the same run is Diffusion-DPO.
    trainer.train()


if __name__ == "__main__":
    sys.exit(guard(main))
