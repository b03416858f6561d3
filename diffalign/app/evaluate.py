"""``diffalign sample`` and ``diffalign grid``."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.config import parse_args


def sample(argv: Sequence[str]) -> int:
    """Draw images of one model."""
    from diffalign.evaluation.sampling import SampleConfig, run_sample

    run_sample(parse_args(SampleConfig, argv, prog="diffalign sample"))
    return 0


def grid(argv: Sequence[str]) -> int:
    """Draw a grid of prompts and models."""
    from diffalign.evaluation.grid import GridConfig, run_grid

    run_grid(parse_args(GridConfig, argv, prog="diffalign grid"))
    return 0
