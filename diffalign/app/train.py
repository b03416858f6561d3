"""``diffalign train METHOD``: a config from YAML and flags, then the method's trainer."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.app import console
from diffalign.config import parse_args
from diffalign.errors import UserError
from diffalign.trainers import METHODS, load_method


def usage() -> str:
    """Return the text of ``diffalign train --help``."""
    lines = [f"  {name:<9} {method.summary}" for name, method in METHODS.items()]
    return "\n".join(
        [
            "usage: diffalign train METHOD [--config FILE] [--flag VALUE ...]",
            "",
            "Fine-tune a model. FILE is a YAML file or the name of a recipe; flags win over it.",
            "On several devices: accelerate launch -m diffalign train METHOD ...",
            "",
            "methods:",
            *lines,
            "",
            "`diffalign train METHOD --help` lists the flags; `diffalign recipes` the recipes.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Train with the method that the first word names."""
    if not argv:
        raise UserError(f"which method? diffalign train METHOD ...; methods: {', '.join(METHODS)}.")
    name, *rest = argv
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name.startswith("-"):
        raise UserError(f"the method comes first: diffalign train METHOD {name} ...; methods: {', '.join(METHODS)}.")
    config_class, trainer_class = load_method(name)
    config = parse_args(config_class, rest, prog=f"diffalign train {name}")
    console.set_up()
    trainer_class(config).train()
    return 0
