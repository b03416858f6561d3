"""Look at every record of a source once, without decoding: content hashes, sizes and damage.

A plan is what caching and training need to know of a record beside its pixels. It does not depend on a model or on a
resolution.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from diffalign.data.exchange import Exchange
from diffalign.data.geometry import Size
from diffalign.data.images import BadImage
from diffalign.data.records import Record
from diffalign.data.shards import digest, write_atomically
from diffalign.data.sources import Source
from diffalign.errors import UserError

logger = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

_VERSION = 2


@dataclass(frozen=True)
class Plan:
    """One record, without its pixels.

    ``index`` is its place in the source; ``digests`` are content hashes and ``sizes`` (height, width) of its pictures,
    which are its attributes ``sides``; the rest is as in :class:`diffalign.data.records.Record`.
    """

    index: int
    id: str
    captions: tuple[str, *tuple[str | None, ...]]
    numbers: Mapping[str, float | None]
    sides: tuple[str, ...]
    digests: tuple[str, ...]
    sizes: tuple[Size, ...]

    @property
    def prompt(self) -> str:
        return self.captions[0]

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt, and what each picture is conditioned on: its own caption, or the prompt where it has none."""
        return tuple(self.prompt if caption is None else caption for caption in self.captions)


def plan_record(index: int, record: Record, thorough: bool = False) -> Plan:
    """Inspect the pictures of a record, and decode them too where ``thorough``. Raises BadImage."""
    images = [getattr(record, side) for side in record.SIDES]
    if thorough:
        for image in images:
            image.decode()
    found = [image.inspect() for image in images]
    return Plan(
        index=index,
        id=record.id,
        captions=record.captions,
        numbers=record.numbers,
        sides=record.SIDES,
        digests=tuple(inspection.digest for inspection in found),
        sizes=tuple(inspection.size for inspection in found),
    )


def plan_source(
    source: Source[Any],
    *,
    cache_dir: Path | None = None,
    exchange: Exchange | None = None,
    thorough: bool = False,
    progress: bool = True,
) -> list[Plan]:
    """Plans of all sound records of a source, in order; the others are counted in ``source.bad_rows``.

    With a ``cache_dir``, the plans of a source whose files did not change are read instead of the pictures.
    ``thorough`` decodes every picture, which also finds damage in the middle of a file.

    Raises:
        UserError: more bad rows than allowed.
    """
    exchange = exchange or Exchange()
    fingerprint = source.fingerprint()
    saved = None
    if cache_dir is not None and fingerprint is not None:
        saved = cache_dir / "plans" / f"{digest(str(_VERSION), str(thorough), fingerprint)}.json"
    outcomes = _read(saved)
    if outcomes is None:

        def look(index: int) -> Plan | str:
            try:
                return plan_record(index, source[index], thorough)
            except BadImage as error:
                return str(error)

        own = range(exchange.rank, len(source), exchange.world_size)
        bar = tqdm(
            in_parallel(look, own),
            f"looking at {source.noun}",
            len(own),
            disable=not progress or exchange.rank > 0,
            leave=False,
        )
        parts = exchange.share("plans", [plan if isinstance(plan, str) else asdict(plan) for plan in bar])
        outcomes = [parts[i % len(parts)][i // len(parts)] for i in range(len(source))]
        if saved and exchange.rank == 0:
            write_atomically(saved, json.dumps(outcomes).encode())
    plans = []
    for outcome in outcomes:
        if isinstance(outcome, str):
            source.bad_rows.add(outcome)
        else:
            plans.append(restore_plan(outcome))
    return plans


def require_some(plans: Sequence[Plan]) -> None:
    """Raises UserError where nothing is left to train on."""
    if not plans:
        raise UserError("nothing is left to train on: every sample was left out, or has a bad picture (see above).")


def restore_plan(fields: dict[str, Any]) -> Plan:
    """A plan from the fields that JSON kept of it."""
    tuples = {name: tuple(fields[name]) for name in ("captions", "sides", "digests")}
    return Plan(**fields | tuples | {"sizes": tuple(map(tuple, fields["sizes"]))})


def _read(path: Path | None) -> Sequence[dict[str, Any] | str] | None:
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        logger.warning("%s is damaged: the pictures are looked at again", path)
        return None


def in_parallel(function: Callable[[In], Out], items: Iterable[In], workers: int | None = None) -> Iterator[Out]:
    """Results of ``function`` in order, computed ahead by threads: decoding and hashing free the interpreter."""
    workers = workers or min(16, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
