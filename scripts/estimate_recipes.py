#!/usr/bin/env python
"""Keep the estimate in the head of every training recipe that names a card, such as sdxl-dpo-1x24gb.

    python scripts/estimate_recipes.py            # say which are out of date
    python scripts/estimate_recipes.py --write    # bring them up to date

The line is what `diffalign estimate NAME --card CARD` says, for one usual card of the size in the name.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from diffalign import recipes
from diffalign.app.estimate import read
from diffalign.config import load_yaml, write_text
from diffalign.estimation.cards import find_card, load_calibration
from diffalign.estimation.estimate import Estimate, estimate
from diffalign.estimation.report import one_line
from diffalign.trainers import METHODS

CARDS = {
    8: "RTX 3070",
    12: "RTX 3060",
    16: "RTX 4080",
    24: "RTX 4090",
    48: "RTX 6000 Ada",
    80: "H100",
}
"""A usual card of each size."""
_NAME = re.compile(r"-(\d+)x(\d+)gb$")
_LINE = re.compile(r"^# Estimated: .*\n(?:#   .*\n)?", re.MULTILINE)


def sized() -> list[str]:
    """The training recipes that name a card."""
    return [
        name
        for name in recipes.names()
        if _NAME.search(name) and "iterated" not in name and load_yaml(recipes.find(name)).get("method") in METHODS
    ]


def estimated(name: str) -> Estimate:
    """The estimate of a recipe on its card."""
    found = _NAME.search(name)
    assert found is not None
    processes, size = map(int, found.groups())
    config, work = read(name, processes=processes)
    return estimate(work(config), find_card(CARDS[size]), load_calibration())


def line(name: str, found: Estimate) -> str:
    """The line of a recipe."""
    return f"# Estimated: {one_line(found)} (`diffalign estimate {name} --card {found.card.name!r}`).\n"


def with_line(text: str, line: str) -> str:
    """A recipe's text with its line in place of an old one, or else before the last paragraph of its head, which says
    how to run it."""
    if _LINE.search(text):
        return _LINE.sub(lambda _: line, text, count=1)
    comments, mark, settings = text.partition("\nmethod:")
    head, gap, usage = comments.rpartition("\n#\n")
    if not mark or not gap:
        raise ValueError("no paragraphs of comments before 'method:' to put the estimate between")
    return f"{head}\n{line}#\n{usage}{mark}{settings}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sized(), help="recipes; all by default")
    parser.add_argument("--write", action="store_true", help="bring them up to date")
    args = parser.parse_args(argv)
    wrong = 0
    for name in args.names:
        found = estimated(name)
        path = recipes.find(name)
        text = path.read_text(encoding="utf-8")
        new = with_line(text, line(name, found))
        state = "up to date" if new == text else "written" if args.write else "out of date"
        wrong += not found.fits or (new != text and not args.write)
        print(f"{name}: {one_line(found)}; {'fits' if found.fits else 'DOES NOT FIT'}; {state}", flush=True)
        if args.write and new != text:
            write_text(path, new)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
