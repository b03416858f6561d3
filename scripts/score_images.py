"""Score images by rewards: folders, files or patterns in, a row of scores an image out. Copy and change it.

python scripts/score_images.py --images runs/drawn --reward shapes-clip shapes-checker --out scores.jsonl
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.evaluation.scoring import ScoreConfig, run_score


def main() -> None:
    config = parse_args(ScoreConfig, description=__doc__)

    # run_score reads ahead, resumes, and obeys the failure policy. The scores alone are two lines:
    #   reward = diffalign.rewards.load_reward("shapes-clip")
    #   scores = reward(images, prompts).rewards      # PIL images or a tensor (N, 3, H, W) in [0, 1]
    run_score(config)


if __name__ == "__main__":
    sys.exit(guard(main))
