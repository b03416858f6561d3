"""``diffalign score IMAGES --reward NAME --out FILE``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from diffalign.app import console
from diffalign.config import parse_args


def main(argv: Sequence[str]) -> int:
    """Score images by rewards."""
    from diffalign.evaluation.scoring import ScoreConfig, run_score

    images = list(takewhile(lambda word: not word.startswith("-"), argv))
    words = [*(["--images", *images] if images else []), *argv[len(images) :]]
    config = parse_args(ScoreConfig, words, prog="diffalign score")
    console.set_up()
    run_score(config)
    return 0
