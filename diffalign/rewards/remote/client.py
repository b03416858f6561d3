"""The reward ``remote``: scores that a reward server computes, see :mod:`diffalign.rewards.remote.server`.

reward = load_reward("remote:http://127.0.0.1:8000/hpsv3")
waiting = reward.submit(images, prompts)      # goes on drawing meanwhile
scores = waiting.result().rewards
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.base import Reward
from diffalign.rewards.inputs import GroupIds, Images, Metadata, as_pictures
from diffalign.rewards.output import RewardError, RewardOutput
from diffalign.rewards.remote.protocol import VERSION, BadAnswer, Limits, Score, encode_image, read_answer, write_json
from diffalign.rewards.remote.spawn import SpawnedServer
from diffalign.rewards.remote.transport import Address, Refused, Transport, Unreachable, read_token

logger = logging.getLogger(__name__)

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_FRAME = 128
"""Bytes of a PNG, and of a request, around what they carry."""
_CHANGED = "the server now runs {}, not {} as before: their scores cannot be mixed"


class _Served:
    """What only the server knows of a reward: it is asked when that is first read. The class itself has a default."""

    def __init__(self, default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: RemoteReward | None, owner: type) -> Any:
        if instance is None:
            return self.default
        instance.prepare()
        return instance.described.get(self.name, self.default)


class RemoteReward(Reward):
    """A reward of a reward server. Not differentiable; images are sent as PNG, so floats are rounded to 8 bits.

    What the server says of the reward (its mode, whether it needs prompts, its identity) holds here too; it is asked
    when that is first needed. Where no score can be had, because no server answers or what they answer is no score,
    the images are returned as invalid with the reason, and what follows is up to the failure policy.

    Args:
        checkpoint: ``http://host:port/NAME`` of one server, or several joined by commas, as it is written after
            ``remote:``.
        addresses: instead of these, a list; each may end in the reward's name.
        reward: name of the reward there; not needed where an address says it or only one is served.
        timeout: seconds until an answer must be complete; at least what scoring a full server's queue takes.
        retries: how often to ask again, after each server has failed once.
        backoff_seconds: pause before the first of these; each next one is twice as long, up to 30 s.
        concurrency: requests under way at once, for each server.
        token_file: file with the server's token; without it the environment variable DIFFALIGN_REWARD_TOKEN is used.
        python: another Python interpreter that has diffalign. Instead of asking servers that run, one is started in it
            that serves ``reward``, and stopped when this process ends.
        serve: further options of that server's ``diffalign serve-reward``, such as ``{"max_items": 64}``.
        batch_size: images of one request. A group stays in one request, however large.
        device, dtype: of a server started with ``python``; others chose their own.

    Raises:
        UserError: addresses and options do not fit each other.
    """

    name = "remote"
    summary = "what a reward server says: remote:http://host:port/NAME"
    licence = "that of the reward it asks for"
    takes = "pil"
    version: Any = _Served("1")
    uses_prompt: Any = _Served(True)
    required_metadata: Any = _Served(())
    mode: Any = _Served("pointwise")
    scale: Any = _Served("unbounded")
    typical: Any = _Served(None)

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        addresses: Sequence[str] | str | None = None,
        reward: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
        backoff_seconds: float = 1.0,
        concurrency: int = 2,
        token_file: str | Path | None = None,
        python: str | Path | None = None,
        serve: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = torch.float32,
        offload: Any = "none",
    ) -> None:
        super().__init__(device="cpu", dtype=dtype, batch_size=batch_size, offload=offload)
        for key, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise UserError(f"{key} of the reward remote must be at least {least}, got {value}")
        if timeout <= 0 or backoff_seconds < 0:
            raise UserError(
                "the reward remote needs a timeout above 0 s and a backoff_seconds of at least 0, got "
                f"{timeout:g} and {backoff_seconds:g}"
            )
        self.request_size, self.concurrency = batch_size, concurrency
        self.served_name: str | None = reward
        self.batch_size = sys.maxsize  # `score` is given everything, and divides it among requests that overlap
        self.described: dict[str, Any] = {}
        self._spawned: SpawnedServer | None = None
        token: str | None
        if python is not None:
            if checkpoint or addresses or not reward:
                raise UserError("the reward remote with python= starts a server of reward=, and takes no addresses")
            place = {"device": device, "dtype": _DTYPES.get(self.dtype)}
            self._spawned = SpawnedServer(python, reward, {**place, **(serve or {})})
            token, places = self._spawned.token, self._spawned.addresses
        elif serve:
            raise UserError("the reward remote takes serve= only with python=: a running server has its own options")
        else:
            fixed = self._parse(addresses or checkpoint)
            token, places = read_token(token_file), lambda: fixed
        self.name = self.served_name or "remote"
        if self._spawned is not None:
            self.served_name = None  # it serves one, and calls it as it likes
        self._transport = Transport(
            places, timeout=timeout, retries=retries, backoff_seconds=backoff_seconds, token=token
        )
        self._limits = Limits()
        self._lock = threading.RLock()
        self._pools: dict[str, ThreadPoolExecutor] = {}

    def _parse(self, addresses: Sequence[str] | str | None) -> list[Address]:
        texts = addresses.split(",") if isinstance(addresses, str) else list(addresses or [])
        if not texts:
            raise UserError("the reward remote needs an address: remote:http://127.0.0.1:8000/NAME, or addresses=")
        parsed = [Address.parse(text.strip()) for text in texts]
        names = {name for _, name in parsed if name} | ({self.served_name} if self.served_name else set())
        if len(names) > 1:
            raise UserError(f"the addresses of a remote reward must be of one reward, got {', '.join(sorted(names))}")
        self.served_name = next(iter(names), None)
        return list(dict.fromkeys(address for address, _ in parsed))

    @property
    def identity(self) -> str:
        """Of the reward that the server runs: its scores are the same, wherever it runs."""
        self.prepare()
        return self._identity

    def prepare(self) -> None:
        """Ask the servers what they serve, once; see :meth:`load`."""
        with self._lock:
            super().prepare()

    def load(self) -> None:
        """Ask the servers what they serve, as often as for scores.

        Raises:
            UserError: a server refuses, or does not serve this reward, or two serve different ones under its name.
            RewardError: no server answers, or what answers is none, or another reward is served than before.
        """
        found = self._transport.insist(self._ask_what_is_served)
        (first, row), *others = found.items()
        for address, other in others:
            if other["identity"] != row["identity"]:
                raise UserError(
                    f"{first} serves {row['identity']} and {address} {other['identity']}: their scores cannot be mixed"
                )
        if self._identity and self._identity != row["identity"]:
            raise RewardError(_CHANGED.format(row["identity"], self._identity))
        self._identity, self.served_name, self.described = row["identity"], row["name"], dict(row)

    def _ask_what_is_served(self) -> dict[Address, Mapping[str, Any]]:
        """This reward's row of every server that answers."""
        found: dict[Address, Mapping[str, Any]] = {}
        problems = []
        for address in self._transport.addresses():
            try:
                found[address] = self._pick(self._transport.get(address, "/rewards"), address)
            except Unreachable as error:
                problems.append(str(error))
        if not found:
            raise Unreachable(f"no reward server, start one with diffalign serve-reward: {'; '.join(problems)}")
        if problems:
            logger.warning("not every reward server answers: %s", "; ".join(problems))
        return found

    def _pick(self, answer: Mapping[str, Any], address: Address) -> Mapping[str, Any]:
        """The row of this reward in a server's list; its limits are remembered."""
        rows, limits = answer.get("rewards"), answer.get("limits")
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("identity"), str)
            for row in rows
        ):
            raise BadAnswer(f"{address} does not list rewards as a reward server does")
        if not isinstance(limits, dict) or not all(isinstance(limits.get(key), int) for key in vars(self._limits)):
            raise BadAnswer(f"{address} does not say how large a request may be")
        self._limits = Limits(**{key: limits[key] for key in vars(self._limits)})
        by_name = {row["name"]: row for row in rows}
        if self.served_name is None and len(by_name) == 1:
            return next(iter(by_name.values()))
        if self.served_name not in by_name:
            wanted = f"no reward {self.served_name!r}" if self.served_name else "several rewards"
            near = did_you_mean(self.served_name or "", by_name)
            raise UserError(
                f"{address} serves {wanted}.{near} It serves {', '.join(by_name)}: name one, {address}/NAME."
            )
        return by_name[self.served_name]

    def submit(
        self,
        images: Images,
        prompts: Sequence[str] | str | None = None,
        metadata: Metadata | None = None,
        *,
        group_ids: GroupIds | None = None,
    ) -> Future[RewardOutput]:
        """Score in the background: what a call returns or raises, later, by ``.result()``.

        The images are copied before this returns and may then change. Scores are on the CPU.
        """
        pictures = [image.copy() for image in as_pictures(images, self.name)]
        return self._pool("calls", 4).submit(self, pictures, prompts, metadata, group_ids=group_ids)

    def score(
        self,
        images: list[Image.Image],
        prompts: list[str],
        metadata: list[Mapping[str, Any]],
        group_ids: list[int] | None = None,
    ) -> RewardOutput:
        """Divide the images among requests, and put the answers together."""
        groups: Sequence[int | None] = group_ids or [None] * len(images)
        jobs = [_Job.make(i, *parts) for i, parts in enumerate(zip(images, prompts, metadata, groups, strict=True))]
        pool = self._pool("requests", self.concurrency * len(self._transport.addresses()))
        parts = pool.map(self._ask, self._divide(jobs))
        results = dict(itertools.chain.from_iterable(parts))
        return _together([results[index] for index in range(len(jobs))])

    def _pool(self, kind: str, workers: int) -> ThreadPoolExecutor:
        # Calls wait for requests, so that they must not share threads.
        with self._lock:
            if kind not in self._pools:
                self._pools[kind] = ThreadPoolExecutor(workers, thread_name_prefix=f"remote-reward-{kind}")
            return self._pools[kind]

    def _divide(self, jobs: Sequence[_Job]) -> Iterable[list[_Job]]:
        """Requests within the server's limits; images of a group in one."""
        units: dict[int | str, list[_Job]] = {}
        for job in jobs:
            units.setdefault(str(job.index) if job.group is None else job.group, []).append(job)
        most = min(self.request_size, self._limits.items)
        current: list[_Job] = []
        for unit in units.values():
            both = [*current, *unit]
            if current and (
                len(both) > most
                or sum(job.pixels for job in both) > self._limits.request_pixels
                or sum(job.bytes for job in both) + _FRAME > self._limits.body_bytes
            ):
                yield current
                both = unit
            current = both
        if current:
            yield current

    def _ask(self, jobs: Sequence[_Job]) -> list[tuple[int, Score | str]]:
        """The answer to one request, or the same reason for all of its images."""
        name = str(self.served_name)
        ids = [str(job.index) for job in jobs]
        payload = {"version": VERSION, "rewards": [name], "items": [job.to_json() for job in jobs]}
        try:
            results, identity = self._transport.post("/score", payload, lambda body: read_answer(body, ids, name))
            if identity != self._identity:
                raise BadAnswer(_CHANGED.format(identity, self._identity))
        except Refused as error:
            if error.status in (400, 413):
                return [(job.index, str(error)) for job in jobs]
            raise
        except (Unreachable, BadAnswer) as error:
            return [(job.index, str(error)) for job in jobs]
        return [(job.index, result) for job, result in zip(jobs, results, strict=True)]

    def close(self) -> None:
        """Let go of threads, and stop the server that was started for this reward."""
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown()
        if self._spawned is not None:
            self._spawned.stop()
        super().close()


@dataclass(frozen=True)
class _Job:
    """One image of a call, and what is said of it."""

    index: int
    image: Image.Image
    row: dict[str, Any]
    bytes: int
    group: int | None

    @classmethod
    def make(cls, index: int, image: Image.Image, prompt: str, metadata: Mapping[str, Any], group: int | None) -> _Job:
        row: dict[str, Any] = {"id": str(index), "prompt": prompt}
        if metadata:
            row["metadata"] = dict(metadata)
        if group is not None:
            row["group"] = group
        try:
            size = len(write_json(row))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the metadata of image {index} cannot be sent to a reward server as JSON: {error}"
            ) from error
        # At most: what cannot be packed takes 3 bytes a pixel and one a line, and 4 for 3 in base64.
        packed = 3 * image.width * image.height + image.height
        return cls(index, image, row, size + (packed + packed // 500 + _FRAME) * 4 // 3, group)

    @property
    def pixels(self) -> int:
        return self.image.width * self.image.height

    def to_json(self) -> dict[str, Any]:
        return {**self.row, "image": encode_image(self.image)}


def _together(results: Sequence[Score | str]) -> RewardOutput:
    """Scores and reasons as an output on the CPU; a detail that an image lacks is NaN."""
    nan = float("nan")
    valid = torch.tensor([isinstance(result, Score) for result in results])
    rewards = torch.tensor([result.reward if isinstance(result, Score) else nan for result in results])
    names = {key: value for result in results if isinstance(result, Score) for key, value in result.details.items()}
    details: dict[str, Tensor] = {}
    for key, example in names.items():
        width = len(example) if isinstance(example, list) else None
        missing: Any = nan if width is None else [nan] * width
        rows = [result.details.get(key, missing) if isinstance(result, Score) else missing for result in results]
        if any((len(row) if isinstance(row, list) else None) != width for row in rows):
            raise RewardError(f"the server's detail {key!r} has not the same number of values for every image")
        details[key] = torch.tensor(rows)
    return RewardOutput(rewards, details, valid, [None if isinstance(result, Score) else result for result in results])
