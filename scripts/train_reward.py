"""Train a reward model on preference pairs. Copy this file and change what you like.

python scripts/train_reward.py --config shapes-reward
accelerate launch scripts/train_reward.py --config clip-h-reward-1x24gb --dataset_name PAIRS --output_dir runs/mine
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.rewards import load_reward
from diffalign.trainers.reward.config import RewardTrainingConfig
from diffalign.trainers.reward.trainer import RewardTrainer


def main() -> None:
    config = parse_args(RewardTrainingConfig, description=__doc__)

    # To change the objective, subclass the trainer: compute_loss(batch) is all of it, and
    # diffalign.rewards.objectives has the losses as functions of tensors.
    folder = RewardTrainer(config).train()

    # The result is a reward like any other, by this name in every command and config too.
    reward = load_reward(f"trained:{folder}")
    print(f"{reward.name}:{folder} is ready; usual mean scores: {reward.typical}")


if __name__ == "__main__":
    sys.exit(guard(main))
