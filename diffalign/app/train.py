"""``diffalign train [METHOD]``: a config from YAML and flags, then the method's trainer."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign import recipes
from diffalign.app import console
from diffalign.config import Parser, load_yaml, parse_args
from diffalign.errors import UserError
from diffalign.trainers import METHODS, load_method, settings_for


def usage() -> str:
    """Return the text of ``diffalign train --help``."""
    lines = [f"  {name:<9} {method.summary}" for name, method in METHODS.items()]
    return "\n".join(
        [
            "usage: diffalign train [METHOD] [--config FILE] [--flag VALUE ...]",
            "",
            "Fine-tune a model. FILE is a YAML file or the name of a recipe; flags win over it. Without a METHOD, the",
            "one that FILE names (`method: dpo`) runs. With one, FILE may be another method's: what only that one has",
            "is left out, and said.",
            "On several devices: accelerate launch -m diffalign train METHOD ...",
            "",
            "methods:",
            *lines,
            "",
            "`diffalign train METHOD --help` lists the flags; `diffalign recipes` the recipes.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Train with the method that the first word names, or else the config's ``method``."""
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, rest = _split(argv)
    config_class, trainer_class = load_method(name)
    console.set_up()
    config = parse_args(
        config_class,
        rest,
        prog=f"diffalign train {name}",
        adapt=lambda settings, source: settings_for(name, settings, source),
    )
    trainer_class(config).train()
    return 0


def _split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The method and the flags."""
    if argv and not argv[0].startswith("-"):
        return argv[0], list(argv[1:])
    given = Parser(add_help=False, allow_abbrev=False)
    given.add_argument("--config")
    source = given.parse_known_args(argv)[0].config
    known = f"methods: {', '.join(METHODS)}"
    if source is None:
        raise UserError(f"which method? diffalign train METHOD ..., or a --config that names one; {known}.")
    name = load_yaml(recipes.resolve(source)).get("method")
    if name is None:
        raise UserError(
            f"{source} names no method. Write `method: dpo` in it, or give the method first: diffalign train dpo "
            f"--config {source}; {known}."
        )
    return str(name), list(argv)
