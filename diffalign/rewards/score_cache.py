"""Scores kept on disk, so that an image is scored once: keyed by its pixels, its prompt and metadata, and the scorer.

    reward = CachedReward(load_reward("pickscore"), ScoreCache("scores"))

Another checkpoint, version or dtype of a scorer has another identity and never meets an old score. Several processes
may share a folder; what a kill interrupts is either there or not.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import GroupIds, Images, Metadata, Reward, RewardError, RewardOutput, Scores
from diffalign.rewards.identity import describe
from diffalign.rewards.inputs import as_group_ids, as_prompts, as_rows, device_of, subset

_FILE = "scores.sqlite3"
_WAIT_SECONDS = 60.0
_KEYS_AT_ONCE = 500
_TABLE = "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, scorer TEXT NOT NULL, score TEXT NOT NULL)"


class ScoreCache:
    """A folder of scores.

    Args:
        folder: made if need be.

    Attributes:
        hits, misses: images found and not found, by the scorer's name, since this object was made.

    Raises:
        UserError: the folder cannot be made or written, or what lies in it is no cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).expanduser() / _FILE
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.path.parent} for scores: {error.strerror}") from error
        with self._connection() as connection:
            connection.execute(_TABLE)

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What is known of the keys: ``{"reward": r, "details": {...}}`` of each that is there."""
        found: dict[str, dict[str, Any]] = {}
        with self._connection() as connection:
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                part = keys[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = connection.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", tuple(part))
                found |= {key: json.loads(score) for key, score in rows}
        return found

    def put(self, scorer: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep scores by their keys, all or none; ``scorer`` is for whoever looks into the file."""
        rows = [(key, scorer, json.dumps(score)) for key, score in scores.items()]
        with self._connection() as connection:
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def __len__(self) -> int:
        with self._connection() as connection:
            count: int = connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
        return count

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one use: one kept open must not be shared by processes or threads."""
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as connection, connection:
                # Safe against a kill; only a power failure could damage the file, and then it is noticed.
                connection.execute("PRAGMA synchronous = NORMAL")
                yield connection
        except sqlite3.Error as error:
            raise UserError(
                f"the cache of scores {self.path} cannot be used: {error}. If the disk is not full and the folder can "
                "be written, the file is damaged: delete it, and images are scored again."
            ) from error


class _Same:
    """An attribute of the reward inside, looked up when needed: one that is remote asks its server for some."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name

    def __get__(self, instance: CachedReward | None, owner: type) -> Any:
        return getattr(Reward if instance is None else instance.reward, self.attribute)


class CachedReward(Reward):
    """A reward that looks into a cache first and keeps what it scores; with ``grad`` it always scores.

    Images without a score are not kept, so they are tried again.

    Args:
        reward: any.
        cache: where scores are; several rewards may share one.
    """

    name: Any = _Same()
    version: Any = _Same()
    summary: Any = _Same()
    differentiable: Any = _Same()
    uses_prompt: Any = _Same()
    required_metadata: Any = _Same()
    mode: Any = _Same()
    scale: Any = _Same()
    typical: Any = _Same()
    input_size: Any = _Same()
    takes: Any = _Same()
    memory_gb: Any = _Same()
    licence: Any = _Same()
    hacks: Any = _Same()

    def __init__(self, reward: Reward, cache: ScoreCache) -> None:
        self.reward, self.cache = reward, cache
        super().__init__(device=reward.device, dtype=reward.dtype, batch_size=reward.batch_size)

    @property
    def identity(self) -> str:
        return self.reward.identity

    def score(self, images: Any, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        return self.reward.score(images, prompts, metadata)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        self.reward.check_prompts(prompts)

    def prepare(self) -> None:
        self.reward.prepare()

    def to(self, device: torch.device | str) -> Reward:
        self.device = torch.device(device)
        self.reward.to(device)
        return self

    def park(self) -> None:
        self.reward.park()

    def close(self) -> None:
        self.reward.close()

    def __call__(
        self,
        images: Images,
        prompts: Sequence[str] | str | None = None,
        metadata: Metadata | None = None,
        *,
        group_ids: GroupIds | None = None,
        grad: bool = False,
    ) -> RewardOutput:
        count = len(images)
        texts = as_prompts(prompts, count, self.name, needed=self.uses_prompt)
        rows = as_rows(metadata, count, self.name, self.required_metadata)
        groups = as_group_ids(group_ids, count, self.name, needed=self.mode == "groupwise")
        if grad or not count:
            return self._ask(images, list(range(count)), texts, rows, groups, grad)
        keys = self._keys(images, texts, rows, groups)
        known = self.cache.get(keys)
        missing = [index for index, key in enumerate(keys) if key not in known]
        self.cache.hits[self.name] += count - len(missing)
        self.cache.misses[self.name] += len(missing)
        messages: dict[str, str | None] = {}
        if missing:
            if self.mode == "pointwise":  # equal images of equal prompts are scored once
                missing = list({keys[index]: index for index in reversed(missing)}.values())[::-1]
            fresh = self._ask(images, missing, texts, rows, groups, False)
            scored = _as_rows(fresh)
            good = {keys[index]: row for index, row in zip(missing, scored, strict=True) if row is not None}
            self.cache.put(self.identity, good)
            known |= good
            messages = {keys[index]: message for index, message in zip(missing, fresh.messages, strict=True)}
        return self._output([known.get(key) for key in keys], [messages.get(key) for key in keys], images)

    def _ask(
        self,
        images: Images,
        indices: list[int],
        texts: list[str],
        rows: list[Mapping[str, Any]],
        groups: list[int] | None,
        grad: bool,
    ) -> RewardOutput:
        whole = len(indices) == len(texts)
        try:
            return self.reward(
                images if whole else subset(images, indices),
                [texts[i] for i in indices],
                [rows[i] for i in indices],
                group_ids=None if groups is None else [groups[i] for i in indices],
                grad=grad,
            )
        finally:
            self.scoring = [indices[i] for i in self.reward.scoring]

    def _keys(
        self, images: Images, texts: list[str], rows: list[Mapping[str, Any]], groups: list[int] | None
    ) -> list[str]:
        """A key for each image; for a groupwise reward, of its group's other images as well."""
        keys = []
        for image, text, row in zip(images, texts, rows, strict=True):
            about = [self.identity, text if self.uses_prompt else "", describe(row)]
            content = hashlib.blake2b(_pixels(image), digest_size=16).hexdigest()
            keys.append(_digest(json.dumps([*about, content], sort_keys=True)))
        if self.mode == "pointwise" or groups is None:
            return keys
        by_group: dict[int, list[str]] = {}
        for key, group in zip(keys, groups, strict=True):
            by_group.setdefault(group, []).append(key)
        return [_digest(key + "".join(sorted(by_group[group]))) for key, group in zip(keys, groups, strict=True)]

    def _output(self, found: list[dict[str, Any] | None], messages: list[str | None], images: Images) -> RewardOutput:
        device = device_of(images)
        valid = torch.tensor([row is not None for row in found], device=device)
        rewards = torch.tensor([row["reward"] if row else torch.nan for row in found], device=device)
        shapes = {name: torch.tensor(value).shape for row in found if row for name, value in row["details"].items()}
        details: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            nothing = torch.full(shape, torch.nan).tolist()
            try:
                values = [row["details"][name] if row else nothing for row in found]
                details[name] = torch.tensor(values, dtype=torch.float32, device=device)
            except (KeyError, ValueError) as error:
                raise RewardError(
                    f"scores of {self.name} in {self.cache.path} have other details than new ones: {name!r}. Did it "
                    "change without its version? Give it a new one, or delete the cache."
                ) from error
        return RewardOutput(rewards, details, valid, messages)


def _as_rows(output: RewardOutput) -> list[dict[str, Any] | None]:
    """What is kept of each image; None of one without a score."""
    details = {name: value.tolist() for name, value in output.details.items()}
    return [
        {"reward": reward, "details": {name: values[index] for name, values in details.items()}} if ok else None
        for index, (reward, ok) in enumerate(zip(output.rewards.tolist(), output.valid.tolist(), strict=True))
    ]


def _pixels(image: Any) -> bytes:
    """The content of an image: its form, size and values. 8-bit tensors are as PIL images of the same pixels."""
    if isinstance(image, Image.Image):
        return f"8 bits {image.height} {image.width} ".encode() + image.convert("RGB").tobytes()
    if not isinstance(image, Tensor):
        return repr(image).encode()  # never scored: the reward refuses it
    if image.dtype == torch.uint8 and image.ndim == 3:
        content = image.permute(1, 2, 0).contiguous().cpu()
        return f"8 bits {image.shape[1]} {image.shape[2]} ".encode() + content.numpy().tobytes()
    content = image.detach().float().contiguous().cpu()
    return f"floats {tuple(image.shape)} ".encode() + content.numpy().tobytes()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
