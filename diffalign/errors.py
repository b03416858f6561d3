"""Errors that say what failed, which value, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffalignError(Exception):
    """Base of every error that diffalign raises on purpose."""


class UserError(DiffalignError, ValueError):
    """Something the user can put right. The command line prints it without a traceback."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to ``name`` in any case, or "" if none is near."""
    by_case = {word.lower(): word for word in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.6)
    return f" Did you mean {by_case[near[0]]!r}?" if near else ""
