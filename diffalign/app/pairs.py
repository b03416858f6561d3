"""``diffalign pairs``."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.app import console
from diffalign.config import parse_args


def main(argv: Sequence[str]) -> int:
    """Draw, score and choose pairs."""
    from diffalign.making.pairs import PairsConfig, run_pairs

    config = parse_args(PairsConfig, console.plain_flags(argv, "prompts_file"), prog="diffalign pairs")
    console.set_up()
    run_pairs(config)
    return 0
