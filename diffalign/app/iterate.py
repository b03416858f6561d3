"""``diffalign iterate``."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.app import console
from diffalign.config import parse_args


def main(argv: Sequence[str]) -> int:
    """Run rounds of drawing, scoring and training."""
    from diffalign.making.iterate import IterateConfig, run_iterate

    config = parse_args(IterateConfig, console.plain_flags(argv, "prompts_file"), prog="diffalign iterate")
    console.set_up()
    run_iterate(config)
    return 0
