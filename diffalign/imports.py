"""Finding what a user names by import path or by file: ``package.module:object`` or ``path/to/file.py:object``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.errors import UserError, did_you_mean


def is_import_path(target: str) -> bool:
    """Whether a text is of the form ``place:object``, and not a URL or a Windows path."""
    place, colon, attribute = target.rpartition(":")
    return bool(colon and place) and all(part.isidentifier() for part in attribute.split("."))


def find_callable(target: str, kind: str, known: Iterable[str] = ()) -> Callable[..., Any]:
    """Import what ``place:object`` names.

    Args:
        target: ``package.module:object`` or ``path/to/file.py:object``; object may be ``Class.method``.
        kind: what it is to be, for errors: "reward", "captioner".
        known: names that may have been meant where there is no such module.

    Raises:
        UserError: no such module, file or object, or it cannot be called.
    """
    place, _, attribute = target.rpartition(":")
    module = _load_file(Path(place), kind) if place.endswith(".py") else _load_module(place, kind, known)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(module) if not name.startswith("_")]
            raise UserError(f"{place} has no {attribute!r}.{did_you_mean(attribute, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{target} is a {type(found).__name__}, not a {kind} class or function")
    result: Callable[..., Any] = found
    return result


def _load_module(name: str, kind: str, known: Iterable[str]) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"there is no module {name!r} to import a {kind} from.{did_you_mean(name, known)} "
                "A file is given with its ending: path/to/file.py:Class."
            ) from error
        raise


def _load_file(path: Path, kind: str) -> ModuleType:
    """Run a python file as a module of its own, under a name that cannot hide another module; once."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"there is no file {path} to load a {kind} from")
    name = f"diffalign_file_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"cannot load {path} as a python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
