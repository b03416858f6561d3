"""``diffalign score IMAGES --reward NAME --out FILE``."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.app import console
from diffalign.config import parse_args


def main(argv: Sequence[str]) -> int:
    """Score images by rewards."""
    from diffalign.evaluation.scoring import ScoreConfig, run_score

    words = ["--images", *argv] if argv and not argv[0].startswith("-") else argv
    config = parse_args(ScoreConfig, words, prog="diffalign score")
    console.set_up()
    run_score(config)
    return 0
