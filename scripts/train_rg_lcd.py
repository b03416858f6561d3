"""Distil a text-to-image model to 1 to 8 steps and align it by a reward, in one run. Copy and change this file.

python scripts/train_rg_lcd.py --config shapes-rg_lcd
accelerate launch scripts/train_rg_lcd.py --config sdxl-rg_lcd-1x24gb --dataset_name IMAGES --output_dir runs/mine
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.trainers.rg_lcd import RGLCDConfig, RGLCDTrainer


def main() -> None:
    config = parse_args(RGLCDConfig, description=__doc__)
    trainer = RGLCDTrainer(config)

    # To change the objective, subclass the trainer: distil(batch) gives B one-step predictions with their graph, the
    # target's, the images' latents and the prompts; diffalign.trainers.rg_lcd.rg_lcd_losses is what is minimised.
    trainer.train()


if __name__ == "__main__":
    sys.exit(guard(main))
