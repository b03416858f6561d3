"""Compare models side by side: rows are prompts, columns models, the same seeds in each column. Copy and change it.

python scripts/make_grid.py --help
"""

from __future__ import annotations

import sys

from diffalign.cli import guard
from diffalign.config import parse_args
from diffalign.evaluation.grid import GridConfig, run_grid


def main() -> None:
    config = parse_args(GridConfig, description=__doc__)

    # run_grid draws what is missing, scores it, lays out the grid and writes it. The layout alone is
    # diffalign.evaluation.grid.make_grid: PIL images in, one PIL image out.
    run_grid(config)


if __name__ == "__main__":
    sys.exit(guard(main))
