"""From a path, a hub id or objects in memory to a table: which layout is it, and which files belong to the split?"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.assets import resolve
from diffalign.data.tables import ArrowTable, Row, RowsTable, StreamTable
from diffalign.errors import UserError, did_you_mean

Table = RowsTable | ArrowTable | StreamTable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
LAYOUTS = (
    "*.parquet or *.arrow files, *.tar files of webdataset, a folder saved by `datasets`, a list of rows in *.jsonl "
    "or *.json, two folders chosen/ and rejected/ with equal file stems, or images beside captions in *.txt"
)

_WEB_IMAGES = {suffix[1:] for suffix in IMAGE_SUFFIXES}
_SHARD_SUFFIX = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")
_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "heldout", "eval")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_table(source: Any, *, split: str, streaming: bool, config_name: str | None = None) -> Table:
    """Open a data set as a table.

    Args:
        source: a file, a folder, a hub id, a bundled name, a ``datasets`` object or a list of rows (dicts).
        split: which split; a set without splits has only "train".
        streaming: read a hub data set row by row, without downloading it first.
        config_name: the configuration of a hub data set that has several.

    Raises:
        UserError: nothing there, an unknown layout, or no such split; what was found is listed.
    """
    if isinstance(source, (str, Path)):
        path = Path(resolve(str(source))).expanduser()
        if path.exists():
            return _open_local(path, split)
        return _open_hub(str(source), config_name, split, streaming)
    if isinstance(source, Sequence):
        return RowsTable("list of rows", source, [f"list of rows, row {index}" for index in range(len(source))])
    if isinstance(source, Mapping):
        return open_table(_pick(source, split, "the data set"), split=split, streaming=streaming)
    if hasattr(source, "column_names"):
        return ArrowTable("data set", source) if hasattr(source, "__len__") else StreamTable("data set", source)
    raise UserError(f"cannot read data from a {type(source).__name__}. Give a path, a hub id, a data set or a list.")


def _open_local(path: Path, split: str) -> Table:
    if path.is_file():
        opener = _FILES.get(path.suffix)
        if opener is None:
            raise UserError(f"{path}: unknown kind of file {path.suffix!r}. Known layouts: {LAYOUTS}.")
        return opener([path])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        loaded = datasets.load_from_disk(str(path))
        return ArrowTable(str(path), _pick(loaded, split, path) if isinstance(loaded, Mapping) else loaded, root=path)
    for folder in (path / split, path):
        if (folder / "chosen").is_dir() and (folder / "rejected").is_dir():
            return _folder_pair(folder)
    for suffix, opener in _FILES.items():
        files = [file for folder in (path, path / "data", path / split) for file in sorted(folder.glob("*" + suffix))]
        if files:
            return opener(_files_of_split(files, split, path))
    for folder in (path / split, path):
        if folder.is_dir() and (captioned := _captioned_images(folder)):
            return captioned
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise UserError(f"{path}: no data there that is known (found: {inside}). Known layouts: {LAYOUTS}.")


def _files_of_split(files: Sequence[Path], split: str, path: Path) -> list[Path]:
    """The files of one split: ``train.parquet``, ``train-00000-of-00002.parquet``, ``train/anything.parquet``."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        name = file.parent.name if file.parent not in (path, path / "data") else _SHARD_SUFFIX.sub("", file.stem)
        splits.setdefault(name, []).append(file)
    if split in splits:
        return splits[split]
    # A set without splits, whose files bear another name such as metadata.jsonl or pairs-0001.parquet.
    if split == "train" and len(splits) == 1 and not next(iter(splits)).startswith(_SPLITS):
        return list(files)
    raise UserError(f"{path}: no split {split!r}.{did_you_mean(split, splits)} Splits found: {', '.join(splits)}.")


def _pick(splits: Mapping[str, Any], split: str, name: object) -> Any:
    if split in splits:
        return splits[split]
    raise UserError(f"{name}: no split {split!r}.{did_you_mean(split, splits)} Splits found: {', '.join(splits)}.")


def _open_parquet(files: Sequence[Path]) -> Table:
    import datasets
    import pyarrow.parquet

    counted = []
    for file in files:
        try:
            counted.append((file, pyarrow.parquet.read_metadata(file).num_rows))
        except (OSError, pyarrow.ArrowException) as error:
            raise _damaged(file, error) from error
    names = [str(file) for file in files]
    table = _quietly(lambda: datasets.load_dataset("parquet", data_files={"train": names}, split="train"))
    return ArrowTable(names[0] if len(names) == 1 else str(files[0].parent), table, counted, files[0].parent)


def _open_arrow(files: Sequence[Path]) -> Table:
    import datasets
    import pyarrow

    parts = []
    for file in files:
        try:
            parts.append(datasets.Dataset.from_file(str(file)))
        except (OSError, pyarrow.ArrowException) as error:
            raise _damaged(file, error) from error
    counted = [(file, len(part)) for file, part in zip(files, parts, strict=True)]
    name = str(files[0] if len(files) == 1 else files[0].parent)
    return ArrowTable(name, datasets.concatenate_datasets(parts), counted, files[0].parent)


def _open_tar(files: Sequence[Path]) -> Table:
    import datasets

    names = [str(file) for file in files]
    try:
        table = _quietly(lambda: datasets.load_dataset("webdataset", data_files={"train": names}, split="train"))
    except (OSError, ValueError, tarfile.TarError, datasets.exceptions.DatasetGenerationError) as error:
        raise _damaged(files[0] if len(files) == 1 else files[0].parent, error) from error
    return ArrowTable(names[0] if len(names) == 1 else str(files[0].parent), _plain_webdataset(table))


def _plain_webdataset(table: Any) -> Any:
    """The columns of a webdataset under plain names: ``jpg_0.jpg`` is ``jpg_0``, the fields of ``json`` their own."""
    if "__key__" not in (table.column_names or []):
        return table
    fields = (table.features or {}).get("json")
    inside = list(fields) if isinstance(fields, Mapping) else []
    taken = set(table.column_names)
    new = {name: name for name in inside if name not in taken}
    if new:
        table = table.map(lambda row: {name: (row["json"] or {}).get(name) for name in new}, remove_columns=["json"])
        taken |= new.keys()
    names = {"txt": "prompt"} | {n: n.split(".")[0] for n in taken if n.rpartition(".")[2] in _WEB_IMAGES and "." in n}
    names = {old: name for old, name in names.items() if old in taken and name not in taken}
    return table.rename_columns(names) if names else table


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read ({str(error).strip() or type(error).__name__}). Write it again.")


def _open_json(files: Sequence[Path]) -> Table:
    if len({file.parent for file in files}) > 1:
        raise UserError(f"there are lists in several folders; give one of them: {', '.join(map(str, files))}.")
    rows: list[Row] = []
    names: list[str] = []
    for file in files:
        for name, row in _json_rows(file):
            rows.append(_expand_hpd(row))
            names.append(name)
    return RowsTable(str(files[0] if len(files) == 1 else files[0].parent), rows, names, files[0].parent)


def _json_rows(file: Path) -> Iterable[tuple[str, Row]]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        content = _parse(text, str(file))
        if not isinstance(content, list):
            raise UserError(f"{file}: expected a list of rows, found {type(content).__name__}.")
        numbered = [(f"{file} row {index}", row) for index, row in enumerate(content)]
    else:
        lines = [(f"{file} line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        numbered = [(name, _parse(line, name)) for name, line in lines]
    for name, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{name}: expected an object with columns, found {type(row).__name__}.")
    return numbered


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not valid JSON ({error}). Correct it; JSONL has one object a line.") from error


def _expand_hpd(row: Row) -> Row:
    """Rows of HPDv2 hold two file names and two votes in lists: ``file_path``, ``human_preference``."""
    paths, votes = row.get("file_path"), row.get("human_preference")
    if isinstance(paths, list) and isinstance(votes, list) and len(paths) == len(votes) == 2:
        return row | {"image_0": paths[0], "image_1": paths[1], "label_0": votes[0], "label_1": votes[1]}  # type: ignore[operator]
    return row


def _folder_pair(folder: Path) -> Table:
    """Two folders with equal stems; the caption of a stem is ``<stem>.txt`` in either of them or beside them."""
    sides = {side: _images_by_stem(folder / side) for side in ("chosen", "rejected")}
    rows, names = [], []
    for stem in sorted(sides["chosen"].keys() | sides["rejected"].keys()):
        row: dict[str, str | None] = {side: images.get(stem) for side, images in sides.items()}
        captions = {side: _caption(folder / side / f"{stem}.txt") for side in sides}
        row["prompt"] = next(
            (text for text in (_caption(folder / f"{stem}.txt"), *captions.values()) if text is not None), None
        )
        if None not in captions.values() and len(set(captions.values())) == 2:
            row |= {f"{side}_prompt": text for side, text in captions.items()}
        rows.append(row)
        names.append(f"{folder} stem {stem!r}")
    if not rows:
        raise UserError(f"{folder}: no pictures in chosen/ and rejected/ ({', '.join(IMAGE_SUFFIXES)}).")
    return RowsTable(str(folder), rows, names, folder)


def _captioned_images(folder: Path) -> Table | None:
    """Images with their captions in files of the same stem; None where there are none."""
    images = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not any(file.with_suffix(".txt").is_file() for file in images):
        return None
    rows = [{"image": file.name, "prompt": _caption(file.with_suffix(".txt"))} for file in images]
    return RowsTable(str(folder), rows, [str(file) for file in images], folder)


def _images_by_stem(folder: Path) -> dict[str, str]:
    images: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            if file.stem in images:
                raise UserError(f"{folder}: two pictures with the stem {file.stem!r}. Remove one.")
            images[file.stem] = f"{folder.name}/{file.name}"
    return images


def _caption(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _open_hub(name: str, config_name: str | None, split: str, streaming: bool) -> Table:
    import datasets

    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such file or folder.")
    try:
        table = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name!r} is neither a local file or folder nor a data set that could be loaded from the hub, "
            f"split {split!r} ({type(error).__name__}: {reason}). Check the path or id, the split and the network."
        ) from error
    table = _plain_webdataset(table)
    return StreamTable(name, table) if streaming else ArrowTable(name, table)


def _quietly(load: Callable[[], Any]) -> Any:
    """Load without the bars that ``datasets`` draws for converting a local file."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        return load()
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()


_FILES: dict[str, Callable[[Sequence[Path]], Table]] = {
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".jsonl": _open_json,
    ".json": _open_json,
    ".tar": _open_tar,
}
