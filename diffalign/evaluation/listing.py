"""Which images are meant, and what each was drawn for: files, folders, patterns, lists, folders of drawn images."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffalign.data.labelled import ImageColumns
from diffalign.data.layouts import IMAGE_SUFFIXES
from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import UserError
from diffalign.evaluation.folder import ROWS, read_rows

_LISTS = (ROWS, "metadata.jsonl")
_FILE_KEYS = ("file", *ImageColumns.ALIASES["image"])
_PROMPT_KEYS = ImageColumns.ALIASES["prompt"]
SOURCES = (
    "a folder of images, one made by diffalign sample or one with a metadata.jsonl; an image; a pattern such as "
    "'out/*.png'; or a .jsonl of rows with a file and a prompt"
)


@dataclass(frozen=True)
class ListedImage:
    """An image file, and what is known of it. ``prompt`` is None where nothing says it."""

    path: Path
    prompt: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """How it is named in lists of scores: its path as it was given, with forward slashes."""
        return self.path.as_posix()


def list_images(sources: Sequence[str]) -> list[ListedImage]:
    """The images of all sources, each once, in order; those of a folder by name, of a list as listed.

    Prompts come from ``samples.jsonl`` (as :mod:`diffalign.evaluation.folder` writes it), from ``metadata.jsonl``, or
    from text files of the same stem.

    Raises:
        UserError: a source that is not there or holds no images, a row that names no file, or one image with two
            prompts.
    """
    found: dict[Path, ListedImage] = {}
    for source in sources:
        before = len(found)
        for image in _of_source(source):
            known = found.setdefault(image.path, image)
            if known.prompt is not None and image.prompt is not None and known.prompt != image.prompt:
                raise UserError(f"{image.file} is listed with two prompts, {known.prompt!r} and {image.prompt!r}")
            if known.prompt is None:
                found[image.path] = image
        if len(found) == before and not any(True for _ in _of_source(source)):
            raise UserError(f"{source}: no images there. Give {SOURCES}.")
    return list(found.values())


def _of_source(source: str) -> Iterator[ListedImage]:
    path = Path(source).expanduser()
    if path.exists():
        yield from _of_path(path)
        return
    if not glob.has_magic(source):
        raise UserError(f"{source}: no such file or folder. Give {SOURCES}.")
    for match in sorted(glob.glob(str(path), recursive=True)):
        if Path(match).is_dir() or Path(match).suffix.lower() in IMAGE_SUFFIXES:
            yield from _of_path(Path(match))


def _of_path(path: Path) -> Iterator[ListedImage]:
    if path.is_dir():
        listed = next((path / name for name in _LISTS if (path / name).is_file()), None)
        if listed is not None:
            yield from _of_list(listed)
            return
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
                yield _alone(file)
    elif path.suffix == ".jsonl":
        yield from _of_list(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield _alone(path)
    else:
        raise UserError(f"{path} is no image that is known ({', '.join(IMAGE_SUFFIXES)}). Give {SOURCES}.")


def _alone(file: Path) -> ListedImage:
    caption = file.with_suffix(".txt")
    return ListedImage(file, caption.read_text(encoding="utf-8").strip() if caption.is_file() else None)


def _of_list(path: Path) -> Iterator[ListedImage]:
    for number, row in enumerate(read_rows(path), 1):
        name = _take(row, _FILE_KEYS)
        if name is None:
            raise UserError(f"{path} row {number} names no file: expected one of {', '.join(_FILE_KEYS)}")
        yield ListedImage(path.parent / name, _take(row, _PROMPT_KEYS), row)


def _take(row: dict[str, Any], keys: Sequence[str]) -> str | None:
    """Take the first of the keys that holds a text out of a row."""
    for key in keys:
        if isinstance(row.get(key), str):
            return str(row.pop(key))
    return None


def with_prompts(
    images: Sequence[ListedImage], prompts: Sequence[str] | None = None, prompts_file: str | None = None
) -> list[ListedImage]:
    """The images with other prompts than they brought along.

    Args:
        prompts: one for all, or one for each in order.
        prompts_file: a text file with a line for each image in order, or a JSONL file of ``{"prompt": ...}`` in order
            or, with a "file" (or "file_name") in each row, in any order.

    Raises:
        UserError: both are given, their number is another one than the images', or an image is not in the file.
    """
    if prompts is not None and prompts_file is not None:
        raise UserError("give either prompts or prompts_file, not both")
    if prompts is None and prompts_file is None:
        return list(images)
    given = [Prompt(text) for text in prompts] if prompts is not None else read_prompts(prompts_file or "")
    if prompts is not None and len(given) == 1:
        given = given * len(images)
    if given and all(_named(prompt) for prompt in given):
        return _by_file(images, given, Path(prompts_file or ""))
    if len(given) != len(images):
        raise UserError(
            f"{prompts_file or 'prompts'}: {len(given)} prompts for {len(images)} images. Give one for each, in the "
            'order of their names, or a JSONL of {"file": ..., "prompt": ...}.'
        )
    return [
        replace(image, prompt=prompt.text, metadata={**image.metadata, **prompt.metadata})
        for image, prompt in zip(images, given, strict=True)
    ]


def _named(prompt: Prompt) -> str | None:
    return _take(dict(prompt.metadata), _FILE_KEYS)


def _by_file(images: Sequence[ListedImage], given: Sequence[Prompt], source: Path) -> list[ListedImage]:
    """By the path beside the file of prompts, or else by the name alone."""
    paths: dict[Path, Prompt | None] = {(source.parent / str(_named(prompt))).resolve(): prompt for prompt in given}
    names: dict[str, list[Prompt]] = {}
    for row in given:
        names.setdefault(Path(str(_named(row))).name, []).append(row)
    result = []
    for image in images:
        alike = names.get(image.path.name, [])
        prompt: Prompt | None = paths.get(image.path.resolve(), alike[0] if len(alike) == 1 else None)
        if prompt is None:
            why = f"{len(alike)} rows have its name" if alike else "no row names it"
            raise UserError(f"{source}: no prompt for {image.file}: {why}")
        rest = {key: value for key, value in prompt.metadata.items() if key not in _FILE_KEYS}
        result.append(replace(image, prompt=prompt.text, metadata={**image.metadata, **rest}))
    return result
