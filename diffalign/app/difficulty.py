"""``diffalign difficulty SET``."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.app import console
from diffalign.config import parse_args


def main(argv: Sequence[str]) -> int:
    """Sort pairs from easy to hard and keep the easy ones."""
    from diffalign.making.difficulty import DifficultyConfig, run_difficulty

    config = parse_args(DifficultyConfig, console.plain_flags(argv, "dataset_name"), prog="diffalign difficulty")
    console.set_up()
    run_difficulty(config)
    return 0
