"""What a command shows: our own lines, and of the libraries below only what went wrong."""

from __future__ import annotations

import logging


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
