"""What a command shows: our own lines, and of the libraries below only what went wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence


def set_up(level: int = logging.INFO) -> None:
    """Show diffalign's log lines from ``level`` on; of diffusers and transformers only errors, and no loading bars.

    Bars of downloads from the hub stay.
    """
    import diffusers
    import transformers

    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffalign").setLevel(level)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def plain_flags(argv: Sequence[str], first: str) -> list[str]:
    """The words of a command as flags of its config: a first word that is no flag is ``first``, --out --output_dir."""
    words = [word.replace("--out", "--output_dir", 1) if word.partition("=")[0] == "--out" else word for word in argv]
    return words if not words or words[0].startswith("-") else [f"--{first}", *words]
