"""A store of tensors on disk, keyed by content: safetensors shards that are complete or absent.

A shard is written aside and moved into place, and its name is the hash of its bytes: processes and runs can share a
folder without agreeing on names, and damage shows. It holds ``keys`` (N, 16) uint8 and, under each other name, the
tensors of its N entries, stacked. Reading maps the file into memory and copies one row.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffalign.errors import UserError

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
SHARD_ENTRIES = 256
"""A shard is closed at this many bytes or entries: what a kill can cost."""

_CHECKED = "checked.json"
_STALE_SECONDS = 24 * 3600


def digest(*parts: str) -> str:
    """A key made of parts: 32 hex digits."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def default_cache_dir() -> Path:
    """``$DIFFALIGN_CACHE``, or ``diffalign`` in the user's cache folder."""
    if "DIFFALIGN_CACHE" in os.environ:
        return Path(os.environ["DIFFALIGN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffalign"


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The folder of a cache, made if need be; the default one for None. Raises UserError where it cannot be made."""
    folder = Path(cache_dir or default_cache_dir()).expanduser()
    make_folder(folder)
    return folder


def make_folder(folder: Path) -> None:
    """Make a folder of the cache.

    Raises:
        UserError: no space left, or no right to write there.
    """
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, and the folders above it; it is complete or absent.

    Raises:
        UserError: no space left, or no right to write there.
    """
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _explained(path.parent, len(content)):
            aside.write_bytes(content)
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(folder: Path, needed: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(folder, needed) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write to {folder} ({error.strerror}). Choose another cache_dir.") from error
        raise


def free_space(folder: Path) -> int:
    """Bytes that are free where ``folder`` is or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def no_space(folder: Path, needed: int) -> UserError:
    """The error for a full disk; ``needed`` in bytes."""
    more, free = (f"{size / 1e6:.4g} MB" for size in (needed, free_space(folder)))
    return UserError(
        f"no space left for the cache in {folder}: it needs {more} more, and {free} are free. "
        "Make room, choose another cache_dir, store latents in float16, or encode on the fly."
    )


class ShardStore:
    """One folder of shards.

    Args:
        folder: where the shards lie; made when first written.
        about: what its entries were made with, kept beside them for whoever looks.
    """

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        self.folder = folder
        self._about = dict(about)
        self._shards: list[Path] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._pending: dict[tuple[object, ...], dict[str, dict[str, Tensor]]] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places or any(key in entries for entries in self._pending.values())

    def refresh(self) -> None:
        """Index the shards that are new in the folder. A damaged one is removed, with a log line."""
        if not self.folder.is_dir():
            return
        known = set(self._shards)
        checked = self._read_checked()
        fresh = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in known:
                continue
            keys = self._sound_keys(path, checked)
            if keys is None:
                continue
            fresh[path.name] = _state(path)
            self._shards.append(path)
            for row, key in enumerate(keys):
                self._places.setdefault(key, (len(self._shards) - 1, row))
        if any(checked.get(name) != state for name, state in fresh.items()):
            write_atomically(self.folder / _CHECKED, json.dumps(checked | fresh).encode())
        self._sweep()

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add an entry; entries of equal shapes share shards. :meth:`flush` puts it on disk at the latest.

        Raises:
            UserError: no space left.
        """
        entry = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        kind = tuple((name, tensor.shape, tensor.dtype) for name, tensor in entry.items())
        alike = self._pending.setdefault(kind, {})
        alike[key] = entry
        if len(alike) >= SHARD_ENTRIES or len(alike) * sum(tensor.nbytes for tensor in entry.values()) >= SHARD_BYTES:
            self._write(kind)

    def flush(self) -> None:
        """Write what is pending. Raises UserError where no space is left."""
        for kind in list(self._pending):
            self._write(kind)

    def reader(self, keys: Iterable[str]) -> tuple[ShardReader, Tensor]:
        """A reader, and the place of each key in it: (len(keys), 2) int64, (shard, row).

        Raises:
            KeyError: a key is not there.
        """
        places = torch.tensor([self._places[bytes.fromhex(key)] for key in keys], dtype=torch.int64).view(-1, 2)
        return ShardReader(self._shards), places

    def _write(self, kind: tuple[object, ...]) -> None:
        entries = self._pending[kind]
        first = next(iter(entries.values()))
        tensors = {name: torch.stack([entry[name] for entry in entries.values()]) for name in first}
        keys = [bytes.fromhex(key) for key in entries]
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
        content = save(tensors)
        path = self.folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.safetensors"
        if not self._shards:
            write_atomically(self.folder / "about.json", json.dumps(self._about, indent=2).encode())
        write_atomically(path, content)
        del self._pending[kind]
        self._shards.append(path)
        for row, key in enumerate(keys):
            self._places[key] = (len(self._shards) - 1, row)
        write_atomically(self.folder / _CHECKED, json.dumps(self._read_checked() | {path.name: _state(path)}).encode())

    def _sound_keys(self, path: Path, checked: Mapping[str, list[int]]) -> list[bytes] | None:
        """The keys of a shard, or None where it is damaged (and removed) or gone."""
        try:
            # Reading every byte of a large cache takes minutes, so a shard that did not change is not hashed again.
            if checked.get(path.name) != _state(path):
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                if found != path.stem:
                    raise SafetensorError("its bytes do not match its name")
            with safe_open(path, framework="pt") as shard:
                return [bytes(row) for row in shard.get_tensor("keys").numpy()]
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            logger.warning("the cache shard %s is damaged (%s): removed, its entries are encoded again", path, error)
            path.unlink(missing_ok=True)
            return None

    def _read_checked(self) -> dict[str, list[int]]:
        """Size and time of change of every shard whose bytes were compared with its name."""
        try:
            content = json.loads((self.folder / _CHECKED).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _sweep(self) -> None:
        """Remove what killed processes left half-written."""
        for path in self.folder.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue


class ShardReader:
    """Rows of shards, mapped into memory when first used and kept open; each process opens its own."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._paths = list(shards)
        self._open: dict[int, dict[str, Tensor]] = {}

    def get(self, shard: int, row: int) -> dict[str, Tensor]:
        """The tensors of one entry, copied."""
        columns = self._open.get(shard)
        if columns is None:
            with safe_open(self._paths[shard], framework="pt") as file:
                columns = {name: file.get_tensor(name) for name in file.keys() if name != "keys"}  # noqa: SIM118
            self._open[shard] = columns
        return {name: column[row].clone() for name, column in columns.items()}

    def __getstate__(self) -> dict[str, object]:
        return {"_paths": self._paths, "_open": {}}


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
