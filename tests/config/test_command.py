from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.config import command_line, field, parse_args


@dataclass(kw_only=True)
class Inner:
    """Inside."""

    depth: int = field(1, help="Depth.")
    name: str = field("x", help="Name.")


@dataclass(kw_only=True)
class Outer:
    """Outside."""

    out: Path = field(help="Folder.")
    words: list[str] = field([], help="Words.")
    rewards: list[dict[str, Any]] = field([], help="Mappings.")
    options: dict[str, int] = field({}, help="Options.")
    low: float = field(0.5, help="A number.")
    size: int | None = field(4, help="A size.")
    safe: bool = field(True, help="Whether.")
    inner: Inner = dataclasses.field(default_factory=Inner, metadata={"help": "Inside.", "choices": None})


def test_only_what_differs_from_the_defaults_is_said() -> None:
    assert command_line("diffalign outer", Outer(out=Path("a"))) == "diffalign outer --out=a"


def test_the_command_gives_the_config_again() -> None:
    config = Outer(
        out=Path("a folder"),
        words=["it's", "a <b> $HOME", ""],
        rewards=[{"reward": "x: y", "weight": 0.5}],
        options={"a": 1, "b": -2},
        low=-1e-7,
        size=None,
        safe=False,
        inner=Inner(depth=3, name="--odd"),
    )
    command, name, *words = shlex.split(command_line("diffalign outer", config))
    assert (command, name) == ("diffalign", "outer") and parse_args(Outer, words) == config
