"""``diffalign rewards``: what each reward measures, in which range, what it needs and how it is hacked."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from diffalign.config import Parser

if TYPE_CHECKING:
    from diffalign.rewards.base import RewardCard

_SCALES = {
    "bt_logit": "a difference d is preferred with probability sigmoid(d)",
    "cosine": "a cosine",
    "rating": "a rating",
    "probability": "a share or probability, 0 to 1",
    "unbounded": "no fixed ends",
}


def main(argv: Sequence[str]) -> int:
    """List or show rewards."""
    parser = Parser(prog="diffalign rewards", description="What can score images. No model is loaded for this.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    listing = commands.add_parser("list", help="list the rewards (also without a command)")
    listing.add_argument("--json", action="store_true", help="print all cards as JSON")
    show = commands.add_parser("show", help="print what is known of a reward, and how it is hacked")
    show.add_argument("name", metavar="NAME", help="a name, package.module:Class or path/to/file.py:Class")
    show.add_argument("--json", action="store_true", help="print the card as JSON")
    args = parser.parse_args(list(argv))

    from diffalign.rewards import registry

    if args.command == "show":
        card = registry.card(args.name)
        print(json.dumps(asdict(card), indent=2) if args.json else description(card))
        return 0
    cards, problems = registry.cards()
    if args.command == "list" and args.json:
        print(json.dumps([asdict(card) for card in cards], indent=2))
    else:
        print(table(cards))
    for problem in problems:
        print(problem)
    return 0


def table(cards: Sequence[RewardCard]) -> str:
    """A line for each reward, under a heading."""
    rows = [("name", "range", "gradient", "GB", "licence", "measures")]
    rows += [
        (
            card.name,
            _range(card),
            "yes" if card.differentiable else "no",
            f"{card.memory_gb:g}" if card.memory_gb else "-",
            card.licence or "-",
            card.summary,
        )
        for card in cards
    ]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows
    ]
    return "\n".join([*lines, "", "`diffalign rewards show NAME` says more, and how each is known to be hacked."])


def description(card: RewardCard) -> str:
    """Everything on a card, as text."""
    facts = [
        ("measures", card.summary or "-"),
        ("usual mean", _range(card)),
        ("scale", _SCALES[card.scale]),
        ("gradient", "with respect to the images" if card.differentiable else "none"),
        ("prompts", "needed" if card.uses_prompt else "not used"),
        ("scores", "each image by itself" if card.mode == "pointwise" else "the images of a group together"),
        ("input", f"{card.input_size} pixels a side" if card.input_size else "any size"),
        ("memory", f"{card.memory_gb:g} GB in half precision" if card.memory_gb else "little"),
        ("licence", card.licence or "-"),
    ]
    lines = [card.name, *(f"  {key:<11} {value}" for key, value in facts)]
    if card.hacks:
        lines.append("  known hacks")
        lines += [textwrap.fill(hack, 100, initial_indent="    - ", subsequent_indent="      ") for hack in card.hacks]
    return "\n".join(lines)


def _range(card: RewardCard) -> str:
    return "{:g} to {:g}".format(*card.typical) if card.typical else "-"
