"""Make preference pairs of a model's own samples, chosen by rewards. Copy this file and change what you like.

python scripts/make_pairs.py --config shapes-pairs-making
python scripts/make_pairs.py --config sdxl-pairs-making --prompts_file my_prompts.txt --output_dir runs/mine
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.making.pairs import PairsConfig, run_pairs


def main() -> None:
    config = parse_args(PairsConfig, description=__doc__)

    # run_pairs draws, scores, chooses and writes. The choice alone is a function of scores: replace
    # SelectionConfig.choose by one of your own, made of the functions in diffalign.data.selection.
    run_pairs(config)


if __name__ == "__main__":
    sys.exit(guard(main))
