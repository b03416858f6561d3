"""``diffalign train-reward``: a config from YAML and flags, then the trainer."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.app import console
from diffalign.config import parse_args


def main(argv: Sequence[str]) -> int:
    """Train a reward model and say how good it is."""
    from diffalign.evaluation.calibration import Accuracy
    from diffalign.trainers.reward.config import RewardTrainingConfig
    from diffalign.trainers.reward.trainer import RewardTrainer

    config = parse_args(RewardTrainingConfig, argv, prog="diffalign train-reward")
    console.set_up()
    trainer = RewardTrainer(config)
    folder = trainer.train()
    if trainer.accelerator.is_main_process:
        print(f"held-out accuracy {Accuracy(**trainer.report['heldout_accuracy'])}; the reward is trained:{folder}")
    return 0
