"""``diffalign sample``, ``grid``, ``eval`` and ``compare-rewards``."""

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


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate models on a set of prompts."""
    from diffalign.evaluation.evaluate import EvalConfig, run_eval

    config = parse_args(EvalConfig, argv, prog="diffalign eval")
    console.set_up()
    run_eval(config)
    return 0


def compare_rewards(argv: Sequence[str]) -> int:
    """Compare rewards with choices and with each other."""
    from diffalign.evaluation.compare_rewards import CompareConfig, run_compare

    config = parse_args(CompareConfig, argv, prog="diffalign compare-rewards")
    console.set_up()
    run_compare(config)
    return 0
