"""From a config back to the command that gives it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from diffalign.config.fields import to_dict


def command_line(command: str, config: Any) -> str:
    """The command line that :func:`diffalign.config.parse_args` reads as this config: what differs from the defaults.

    Args:
        command: the words before the flags, such as "diffalign grid".
        config: a config dataclass.
    """
    return " ".join([command, *(shlex.quote(word) for word in _words(config, ""))])


def _words(config: Any, prefix: str) -> list[str]:
    words: list[str] = []
    values = to_dict(config)
    for declared in dataclasses.fields(config):
        name, value = f"{prefix}{declared.name}", getattr(config, declared.name)
        if not declared.init or value == _default(declared):
            continue
        if dataclasses.is_dataclass(value):
            words += _words(value, f"{name}.")
            continue
        plain = values[declared.name]
        if isinstance(plain, list):
            words += [f"--{name}", *map(_word, plain)]
        elif isinstance(plain, Mapping):
            words += [f"--{name}", *(f"{key}={_word(item)}" for key, item in plain.items())]
        else:
            # Joined by "=", so that a negative number or a text that begins with a hyphen is no flag.
            words.append(f"--{name}={_word(plain)}")
    return words


def _default(declared: dataclasses.Field[Any]) -> Any:
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return declared.default


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)  # which YAML reads too
    return str(value)
