"""Dataclass fields with help, and the way from plain values to typed ones and back."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, overload

from diffalign.errors import UserError, did_you_mean

T = TypeVar("T")

_NO_DEFAULT: Any = object()
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@overload
def field(default: T, *, help: str, choices: Sequence[Any] | None = None) -> T: ...
@overload
def field(*, help: str, choices: Sequence[Any] | None = None) -> Any: ...
def field(default: Any = _NO_DEFAULT, *, help: str, choices: Sequence[Any] | None = None) -> Any:
    """Declare a field of a config dataclass.

    Args:
        default: its value when nothing is said; without one the field is required. Lists and mappings are
            copied for each config.
        help: what it does, with its unit, for ``--help``.
        choices: the values it may take (for a list: each of its items). ``Literal[...]`` as the type says the
            same; this is for names that are only known when the module runs.
    """
    metadata = {"help": help, "choices": tuple(choices) if choices is not None else None}
    if default is _NO_DEFAULT:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict, set)):
        return dataclasses.field(default_factory=functools.partial(copy.deepcopy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_dict(cls: type[T], data: Mapping[str, Any], source: str = "config") -> T:
    """Build a config from plain values, converting each to the type of its field.

    Args:
        cls: a dataclass.
        data: keys are field names; a nested dataclass takes a mapping.
        source: where the values come from (a file name), for the messages.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type; names source, key and value.
    """
    return build(cls, convert_fields(cls, data, source))


def to_dict(config: Any) -> dict[str, Any]:
    """Return the plain values (as YAML and JSON know them) of a config, complete, in the order of its fields."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def init_fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return name -> (field, resolved type) of the fields that a dataclass's constructor takes."""
    hints = typing.get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(cls) if f.init}


def convert_fields(cls: type, data: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """Check and convert the values in ``data``, leaving missing ones out and nested dataclasses as mappings."""
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: {prefix.rstrip('.') or 'the file'} must hold keys and values, got {data!r}")
    known = init_fields(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise UserError(
                f"{source}: unknown key '{prefix}{key}'.{hint or ' Known keys: ' + ', '.join(known) + '.'}"
            )
        declared, hint_type = known[key]
        nested = nested_dataclass(hint_type)
        if nested is not None and isinstance(value, Mapping):
            values[key] = convert_fields(nested, value, source, f"{prefix}{key}.")
            continue
        values[key] = convert(value, hint_type, f"{source}: {prefix}{key}")
        check_choices(declared, values[key], f"{source}: {prefix}{key}")
    return values


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Construct ``cls`` from converted values; nested mappings become their dataclasses.

    Raises:
        UserError: a required field has no value.
    """
    ready = dict(values)
    for name, (declared, hint) in init_fields(cls).items():
        nested = nested_dataclass(hint)
        if name in ready and nested is not None and isinstance(ready[name], Mapping):
            ready[name] = build(nested, ready[name], f"{prefix}{name}.")
        if name not in ready and is_required(declared):
            text = declared.metadata.get("help", "")
            raise UserError(
                f"'{prefix}{name}' has no value and no default{': ' + text if text else '.'} "
                f"Give it with --{prefix}{name} on the command line or as '{prefix}{name}:' in the --config file."
            )
    return cls(**ready)


def is_required(declared: dataclasses.Field[Any]) -> bool:
    """Whether a field has neither a default nor a default factory."""
    return declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING


def check_choices(declared: dataclasses.Field[Any], value: Any, where: str) -> None:
    """Refuse a value, or an item of a list, that is not among the field's ``choices``. None is always allowed."""
    choices = declared.metadata.get("choices")
    if choices is None or value is None:
        return
    for item in value if isinstance(value, (list, tuple, set, dict)) else (value,):
        if item not in choices:
            raise UserError(f"{where}: {_not_among(item, choices)}")


def _not_among(value: Any, choices: Iterable[Any]) -> str:
    names = [str(c) for c in choices]
    return f"{value!r} is not one of {', '.join(names)}.{did_you_mean(str(value), names)}"


def is_union(hint: Any) -> bool:
    """Whether a type is ``X | Y`` or ``Optional[X]``."""
    return typing.get_origin(hint) in (Union, types.UnionType)


def members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union without None; any other type alone."""
    return tuple(a for a in typing.get_args(hint) if a is not type(None)) if is_union(hint) else (hint,)


def allows_none(hint: Any) -> bool:
    """Whether None is a value of the type."""
    return hint is Any or hint is type(None) or (is_union(hint) and type(None) in typing.get_args(hint))


def nested_dataclass(hint: Any) -> type | None:
    """Return the dataclass that a type is, or is an optional one of; else None."""
    found = [m for m in members(hint) if dataclasses.is_dataclass(m)]
    return typing.cast(type, found[0]) if len(found) == 1 else None


def describe(hint: Any) -> str:
    """Say in words what values a type takes, such as "a whole number or none"."""
    if is_union(hint):
        return " or ".join([*(describe(m) for m in members(hint)), *(["none"] if allows_none(hint) else [])])
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if (origin or hint) in (list, tuple, set, frozenset):
        if origin is tuple and args and args[-1] is not Ellipsis:
            return f"a list of {len(args)} values"
        return f"a list, each item {describe(args[0])}" if args else "a list"
    if (origin or hint) is dict or dataclasses.is_dataclass(hint):
        return "keys with values"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def convert(value: Any, hint: Any, where: str, *, text: bool = False) -> Any:
    """Convert a plain value to a type.

    Args:
        value: what YAML, JSON or the command line gave.
        hint: int, float, str, bool, Path, Literal, Any, a union of types, a list, tuple, set or dict of types,
            or a dataclass. Numbers may be written as text ("1e-4"); text is never made from numbers.
        where: source and key, the start of the message.
        text: the value is a word of the command line, where "none" means None and 5 may be meant as a number.

    Raises:
        UserError: the value is not one of the type's.
    """
    if hint is Any:
        return value
    if is_union(hint):
        return _convert_union(value, hint, where, text)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for option in args:
            if value == option and type(value) is type(option) or text and str(option) == value:
                return option
        raise UserError(f"{where}: {_not_among(value, args)}")
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), convert_fields(typing.cast(type, hint), value, where))
    container = origin or hint
    if container in (list, tuple, set, frozenset):
        return _convert_sequence(value, hint, container, args, where, text)
    if container is dict:
        if not isinstance(value, Mapping):
            raise _wrong(value, hint, where)
        key_type, item_type = args or (Any, Any)
        return {
            convert(k, key_type, where): convert(v, item_type, f"{where}.{k}", text=text) for k, v in value.items()
        }
    return _convert_scalar(value, hint, where, text)


def _convert_union(value: Any, hint: Any, where: str, text: bool) -> Any:
    options = members(hint)
    if allows_none(hint) and (value is None or text and isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    if len(options) == 1:
        return convert(value, options[0], where, text=text)
    if not text:
        for option in options:
            if type(value) is (typing.get_origin(option) or option):
                return convert(value, option, where)
    for option in sorted(options, key=lambda m: m is str):
        try:
            return convert(value, option, where, text=text)
        except UserError:
            continue
    raise _wrong(value, hint, where)


def _convert_sequence(value: Any, hint: Any, container: type, args: tuple[Any, ...], where: str, text: bool) -> Any:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise _wrong(value, hint, where)
    items = list(value)
    if container is tuple and args and args[-1] is not Ellipsis:
        if len(items) != len(args):
            raise _wrong(value, hint, where)
        kinds = list(args)
    else:
        kinds = [args[0] if args else Any] * len(items)
    return container(
        convert(item, kind, f"{where}[{i}]", text=text)
        for i, (item, kind) in enumerate(zip(items, kinds, strict=True))
    )


def _convert_scalar(value: Any, hint: Any, where: str, text: bool) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUTH:
            return _TRUTH[value.lower()]
    elif hint in (int, float):
        number = _number(value)
        if number is not None and (hint is float or number == int(number)):
            return hint(number)
    elif hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, (bool, int, float)):
            raise UserError(f"{where}: expected text, got {value!r}. Put it in quotes if it is meant as text.")
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value).expanduser()
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _wrong(value, hint, where)


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _wrong(value: Any, hint: Any, where: str) -> UserError:
    return UserError(f"{where}: expected {describe(hint)}, got {value!r}")
