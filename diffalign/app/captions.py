"""``diffalign captions SET``."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.app import console
from diffalign.config import parse_args


def main(argv: Sequence[str]) -> int:
    """Make captions for the images of pairs."""
    from diffalign.making.captions import CaptionsConfig, run_captions

    config = parse_args(CaptionsConfig, console.plain_flags(argv, "dataset_name"), prog="diffalign captions")
    console.set_up()
    run_captions(config)
    return 0
