"""The command line of a config dataclass: a flag for each field, above a YAML file, above the defaults."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from diffalign import recipes
from diffalign.config.fields import (
    allows_none,
    build,
    check_choices,
    convert,
    convert_fields,
    describe,
    init_fields,
    is_required,
    members,
    nested_dataclass,
)
from diffalign.config.files import load_yaml, parse_yaml
from diffalign.errors import UserError, did_you_mean

T = TypeVar("T")

_SOURCE = "command line"
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` lists the flags.")


def parse_args(
    cls: type[T],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    *,
    prog: str | None = None,
    adapt: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
) -> T:
    """Read a config from the command line.

    ``--config`` takes a YAML file or the name of a recipe; flags win over it. A flag has the name of its field,
    with underscores or hyphens: ``--rank 8``; ``--ema``, ``--no_ema`` or ``--ema false``; lists take several
    words; mappings take ``key=value`` words; fields of a nested config are ``--outer.inner``; ``none`` clears
    an optional value.

    Args:
        cls: the dataclass.
        argv: the words; the process's own without it.
        description: what the command does, for ``--help``; without it the docstring of ``cls``.
        prog: name of the command, for ``--help``.
        adapt: what to make of the file's keys and values, and its name, before they are checked.

    Raises:
        UserError: an unknown flag or key, a wrong value, a required field without one.
    """
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        description=description if description is not None else _first_paragraph(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file or name of a recipe (`diffalign recipes`); flags win over it"
    )
    flags = _flags(cls)
    _add_flags(parser, cls, flags)
    words = [_normal(word) for word in (sys.argv[1:] if argv is None else argv)]
    given, unknown = parser.parse_known_args(words)
    if unknown:
        raise _unknown(unknown[0], flags, parser.prog)
    tokens = vars(given)
    values: dict[str, Any] = {}
    source = tokens.pop("config", None)
    if source is not None:
        path = recipes.resolve(source)
        settings = load_yaml(path)
        values = convert_fields(cls, adapt(settings, path) if adapt else settings, path)
    for name, words_given in tokens.items():
        _put(values, name, _read(words_given, *flags[name], f"{_SOURCE}: --{name}"))
    return build(cls, values)


def _flags(cls: type, prefix: str = "") -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Name -> (field, type) of every flag; a nested config gives one for each of its fields."""
    flags = {}
    for name, (declared, hint) in init_fields(cls).items():
        nested = nested_dataclass(hint)
        if nested is not None:
            flags.update(_flags(nested, f"{prefix}{name}."))
        else:
            flags[f"{prefix}{name}"] = (declared, hint)
    return flags


def _add_flags(parser: argparse.ArgumentParser, cls: type, flags: dict[str, Any]) -> None:
    groups: dict[str, Any] = {}
    for name, (declared, hint) in flags.items():
        title = _title(cls, name)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        text = _help(declared, hint)
        if _is_bool(hint):
            group.add_argument(f"--{name}", nargs="?", const="true", metavar="BOOL", help=text)
            head, _, leaf = name.rpartition(".")
            off = f"--{head}.no_{leaf}" if head else f"--no_{leaf}"
            group.add_argument(off, dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
        elif _takes_many(hint):
            group.add_argument(f"--{name}", nargs="*", metavar=_metavar(declared, hint), help=text)
        else:
            group.add_argument(f"--{name}", metavar=_metavar(declared, hint), help=text)


def _title(cls: type, name: str) -> str:
    """The heading of a flag: the docstring of the class that declares its field."""
    head = name.partition(".")[0]
    if head != name:
        return head
    owner = next(c for c in cls.__mro__ if head in c.__dict__.get("__annotations__", {}))
    return _first_paragraph(owner).split("\n")[0].rstrip(".") or owner.__name__


def _first_paragraph(cls: type) -> str:
    doc = (cls.__doc__ or "").strip()
    generated = doc.startswith(f"{cls.__name__}(")  # what dataclass writes when there is no docstring
    return "" if generated else doc.split("\n\n")[0]


def _help(declared: dataclasses.Field[Any], hint: Any) -> str:
    text = declared.metadata.get("help", "").rstrip(".")
    if is_required(declared):
        ending = "(required)"
    else:
        made = declared.default_factory
        default = declared.default if made is dataclasses.MISSING else made()
        # Where None stands for something, the help says for what.
        ending = "" if default is None and "Default:" in text else f"(default: {_show(default)})"
    choices = declared.metadata.get("choices")
    if choices and not _literals(hint):
        text += f"; one of {', '.join(str(c) for c in choices)}"
    return f"{text} {ending}".strip().replace("%", "%%")


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, tuple)):
        return " ".join(str(item) for item in default) or "empty"
    if isinstance(default, dict):
        return " ".join(f"{key}={value}" for key, value in default.items()) or "empty"
    return "none" if default is None else str(default)


def _literals(hint: Any) -> list[str]:
    return [str(a) for m in members(hint) if typing.get_origin(m) is Literal for a in typing.get_args(m)]


def _metavar(declared: dataclasses.Field[Any], hint: Any) -> str:
    literals = _literals(hint)
    if literals and len(literals) == sum(len(typing.get_args(m)) or 1 for m in members(hint)):
        return "{" + ",".join(literals) + "}"
    kind = members(hint)[0]
    if _is_container(kind, dict):
        return "KEY=VALUE"
    if _takes_many(hint):
        items = typing.get_args(kind)
        kind = members(items[0])[0] if items else str
    return _METAVARS.get(kind, "VALUE" if describe(kind) != "a path" else "PATH")


def _is_bool(hint: Any) -> bool:
    return members(hint) == (bool,)


def _is_container(hint: Any, *kinds: type) -> bool:
    return (typing.get_origin(hint) or hint) in kinds


def _takes_many(hint: Any) -> bool:
    return any(_is_container(m, list, tuple, set, frozenset, dict) for m in members(hint))


def _normal(word: str) -> str:
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _read(given: Any, declared: dataclasses.Field[Any], hint: Any, where: str) -> Any:
    value: Any = given
    kinds = members(hint)
    if isinstance(given, list):
        if len(given) == 1 and given[0].lower() in ("none", "null") and allows_none(hint):
            value = given[0]
        elif any(_is_container(m, dict) for m in kinds):
            value = _mapping(given, where)
        elif len(given) == 1 and not all(_is_container(m, list, tuple, set, frozenset) for m in kinds):
            value = given[0]
        else:
            value = [_inline(word, hint, where) for word in given]
    value = convert(value, hint, where, text=True)
    check_choices(declared, value, where)
    return value


def _inline(word: str, hint: Any, where: str) -> Any:
    """A word that stands for a mapping or a config, such as "{name: clip, weight: 2}", is read as YAML."""
    items = [a for m in members(hint) for a in typing.get_args(m)]
    complex_items = any(nested_dataclass(item) is not None or _is_container(item, dict) for item in items)
    return parse_yaml(word, where) if complex_items else word


def _mapping(words: list[str], where: str) -> dict[str, Any]:
    if len(words) == 1 and words[0].startswith("{"):
        return typing.cast("dict[str, Any]", parse_yaml(words[0], where))
    mapping: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{where}: expected words of the form key=value, got {word!r}")
        mapping[key] = value
    return mapping


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *outer, leaf = name.split(".")
    for key in outer:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
    values[leaf] = value


def _unknown(word: str, flags: dict[str, Any], prog: str) -> UserError:
    if not word.startswith("--"):
        return UserError(f"{word!r} is not expected here. `{prog} --help` lists the flags.")
    name = word[2:].partition("=")[0]
    near = did_you_mean(name, [*flags, "config"]).replace("'", "")
    near = near.replace("mean ", "mean --") if near else f" `{prog} --help` lists the flags."
    return UserError(f"unknown flag --{name}.{near}")
