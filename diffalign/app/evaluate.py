"""``diffalign sample`` and ``diffalign grid``."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.app import console
from diffalign.config import parse_args


def sample(argv: Sequence[str]) -> int:
    """Draw images of one model."""
    from diffalign.evaluation.sampling import SampleConfig, run_sample

    config = parse_args(SampleConfig, argv, prog="diffalign sample")
    console.set_up()
    run_sample(config)
    return 0


def grid(argv: Sequence[str]) -> int:
    """Draw a grid of prompts and models."""
    from diffalign.evaluation.grid import GridConfig, run_grid

    config = parse_args(GridConfig, argv, prog="diffalign grid")
    console.set_up()
    run_grid(config)
    return 0
