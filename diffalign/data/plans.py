"""Look at every pair of a source once, without decoding: content hashes, sizes and damage.

A plan is what caching and training need to know of a pair beside its pixels. It does not depend on a model or on a
resolution.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from diffalign.data.exchange import Exchange
from diffalign.data.images import BadImage
from diffalign.data.readers import PairSource
from diffalign.data.records import Pair
from diffalign.data.shards import digest, write_atomically

logger = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """One pair, without its pixels.

    ``index`` is its place in the source; ``digests`` are content hashes and ``sizes`` (height, width) of the chosen
    and the rejected picture; the rest is as in :class:`Pair`.
    """

    index: int
    id: str
    prompt: str
    chosen_prompt: str | None
    rejected_prompt: str | None
    label: float
    margin: float | None
    digests: tuple[str, str]
    sizes: tuple[tuple[int, int], tuple[int, int]]

    @property
    def captions(self) -> tuple[str, str, str]:
        """The prompt, and what the chosen and the rejected picture are conditioned on."""
        chosen = self.prompt if self.chosen_prompt is None else self.chosen_prompt
        rejected = self.prompt if self.rejected_prompt is None else self.rejected_prompt
        return self.prompt, chosen, rejected


def plan_pair(index: int, pair: Pair, thorough: bool = False) -> Plan:
    """Inspect both pictures of a pair, and decode them too where ``thorough``. Raises BadImage."""
    if thorough:
        pair.chosen.decode()
        pair.rejected.decode()
    chosen, rejected = pair.chosen.inspect(), pair.rejected.inspect()
    return Plan(
        index=index,
        id=pair.id,
        prompt=pair.prompt,
        chosen_prompt=pair.chosen_prompt,
        rejected_prompt=pair.rejected_prompt,
        label=pair.label,
        margin=pair.margin,
        digests=(chosen.digest, rejected.digest),
        sizes=(chosen.size, rejected.size),
    )


def plan_source(
    source: PairSource,
    *,
    cache_dir: Path | None = None,
    exchange: Exchange | None = None,
    thorough: bool = False,
    progress: bool = True,
) -> list[Plan]:
    """Plans of all sound pairs of a source, in order; the others are counted in ``source.bad_rows``.

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
                return plan_pair(index, source[index], thorough)
            except BadImage as error:
                return str(error)

        own = range(exchange.rank, len(source), exchange.world_size)
        bar = tqdm(
            in_parallel(look, own),
            "looking at pairs",
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


def restore_plan(fields: dict[str, Any]) -> Plan:
    """A plan from the fields that JSON kept of it."""
    chosen, rejected = fields["sizes"]
    return Plan(**fields | {"digests": tuple(fields["digests"]), "sizes": (tuple(chosen), tuple(rejected))})


def _read(path: Path | None) -> Sequence[dict[str, Any] | str] | None:
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        logger.warning("%s is damaged: the pairs are looked at again", path)
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
