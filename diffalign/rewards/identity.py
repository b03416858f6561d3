"""Which scorer made a score: its name, version, weights, options and code in one short text."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch

_NOT_THE_SCORE = ("device", "batch_size", "offload", "dtype", "local_files_only")
"""Options that say where a reward runs, and the dtype, which is described apart."""
_MODEL_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".pt", ".pth", ".bin"}


def digest(parts: Any) -> str:
    """12 hex digits for plain values, in whatever order mappings have them."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def describe(value: Any) -> Any:
    """A plain value that is equal for equal things: a file or model folder by its content, code by its source.

    What cannot be compared between processes (an object with a state of its own) is described by a random text, so
    that it is equal to nothing else.
    """
    if isinstance(value, int | float | bool | None):
        return value
    if isinstance(value, str | Path):
        path = Path(value).expanduser()
        return content_of(path) if path.exists() else str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, functools.partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.isbuiltin(value):
        return code_of(value)
    return f"{type(value).__name__} {uuid.uuid4().hex}"


def content_of(path: Path) -> str:
    """Hash of a file, or of the weights and configs in a folder: names and contents, not places or dates."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _MODEL_SUFFIXES)
    whole = hashlib.blake2b(digest_size=12)
    for file in files:
        name = "" if path.is_file() else file.name
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        whole.update(f"{name}\0{content}\0".encode())
    return whole.hexdigest()


def code_of(value: Any) -> list[Any]:
    """Name and source of a class or function: its whole file, since what it calls is there as well."""
    parts: list[Any] = [f"{value.__module__}.{value.__qualname__}"]
    try:
        file = inspect.getsourcefile(inspect.unwrap(value))
    except TypeError:  # written in C, or typed at a prompt
        file = None
    if file is not None and Path(file).is_file():
        parts.append(content_of(Path(file)))
    code = getattr(value, "__code__", None)
    if code is not None:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts += [_code_text(code), describe(value.__defaults__ or ()), [describe(cell) for cell in cells]]
    return parts


def _code_text(code: CodeType) -> str:
    """Two lambdas of a file have one name: their code tells them apart."""
    constants = [_code_text(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    text = repr((code.co_code, constants, code.co_names, code.co_varnames))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def options_of(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor was given, by name, without what does not change a score."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    bound = signature.bind(None, *args, **kwargs).arguments
    given: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= bound.get(parameter.name, {})
        elif parameter.name in bound:
            given[parameter.name] = bound[parameter.name]
    return {key: value for key, value in given.items() if key not in _NOT_THE_SCORE and value is not None}
