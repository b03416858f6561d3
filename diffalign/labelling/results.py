"""What the votes say: how often one model's images are preferred, and which rewards agree with people."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.data.write import PairRow, image_bytes, write_pairs
from diffalign.evaluation.calibration import Accuracy, pairwise_accuracy
from diffalign.evaluation.stats import WinRate, win_rate
from diffalign.labelling.items import Item

_FIRST = {"first": 1.0, "tie": 0.5, "second": 0.0}
Votes = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Results:
    """What the votes say.

    Attributes:
        counts: votes by annotator and kind (first, second, tie, skip), of the pairs that are shown.
        win_rates: (model, the one it is compared with, rate): of each pair the majority counts, a draw as half.
        by_annotator: (annotator, model, other, rate) of each one's own votes; empty where one alone voted.
        agreement: share of the pairs without a draw in which the preferred image has the higher score, by reward;
            "the set's own labels" for a set of preferences.
        between: (annotator, annotator, share of equal votes, pairs both voted on without skipping).
    """

    counts: Mapping[str, Mapping[str, int]]
    win_rates: Sequence[tuple[str, str, WinRate]]
    by_annotator: Sequence[tuple[str, str, str, WinRate]]
    agreement: Mapping[str, Accuracy]
    between: Sequence[tuple[str, str, float, int]]

    def lines(self) -> Iterator[str]:
        """In words."""
        for annotator, kinds in self.counts.items():
            yield f"{annotator}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
        for model, other, rate in self.win_rates:
            yield f"people prefer {model} to {other}: {rate}"
        for annotator, model, other, rate in self.by_annotator:
            yield f"{annotator} prefers {model} to {other}: {rate}"
        for name, accuracy in self.agreement.items():
            yield f"{name} agrees with people: {accuracy}"
        for first, second, share, n in self.between:
            yield f"{first} and {second} vote alike: {share:.2f} (n={n})"

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        return {
            "counts": {name: dict(kinds) for name, kinds in self.counts.items()},
            "win_rates": [{"model": m, "against": o, **asdict(rate)} for m, o, rate in self.win_rates],
            "by_annotator": [
                {"annotator": who, "model": m, "against": o, **asdict(rate)} for who, m, o, rate in self.by_annotator
            ],
            "agreement": {name: asdict(accuracy) for name, accuracy in self.agreement.items()},
            "between": [{"annotators": [a, b], "share": share, "n": n} for a, b, share, n in self.between],
        }


def judge(items: Sequence[Item], votes: Votes) -> Results:
    """What votes say of the items; votes on others are not counted."""
    preferred = {item.id: values for item in items if (values := _values(item, votes))}
    voted = [item for item in items if item.id in preferred]
    share = {name: float(np.mean(values)) for name, values in preferred.items()}
    known = {item.id for item in items}
    counts = {
        annotator: {
            kind: sum(vote == kind and item in known for item, vote in own.items()) for kind in (*_FIRST, "skip")
        }
        for annotator, own in votes.items()
    }
    return Results(
        counts,
        list(_win_rates(voted, share)),
        list(_by_annotator(items, votes)),
        _agreement(voted, share),
        list(_between(known, votes)),
    )


def _values(item: Item, votes: Votes) -> list[float]:
    return [_FIRST[own[item.id]] for own in votes.values() if own.get(item.id) in _FIRST]


def _win_rates(items: Sequence[Item], share: Mapping[str, float]) -> Iterator[tuple[str, str, WinRate]]:
    by_models: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        if item.models is not None and item.models[0] != item.models[1]:
            by_models.setdefault(item.models, []).append(item)
    for (first, second), own in by_models.items():
        shares = np.array([share[item.id] for item in own])
        yield second, first, win_rate(1 - shares, shares, groups=[item.prompt for item in own])


def _by_annotator(items: Sequence[Item], votes: Votes) -> Iterator[tuple[str, str, str, WinRate]]:
    values = {
        annotator: {item.id: _FIRST[vote] for item in items if (vote := own.get(item.id)) in _FIRST}
        for annotator, own in votes.items()
    }
    voters = {annotator: own for annotator, own in values.items() if own}
    for annotator, own in voters.items() if len(voters) > 1 else ():
        for model, other, rate in _win_rates([item for item in items if item.id in own], own):
            yield annotator, model, other, rate


def _agreement(items: Sequence[Item], share: Mapping[str, float]) -> dict[str, Accuracy]:
    margins: dict[str, list[tuple[float, float]]] = {}
    for item in items:
        for name, (first, second) in item.scores.items():
            margins.setdefault(name, []).append((first - second, share[item.id]))
        if item.label is not None:
            margins.setdefault("the set's own labels", []).append((item.label - 0.5, share[item.id]))
    found = {name: pairwise_accuracy(*zip(*rows, strict=True)) for name, rows in margins.items()}
    return {name: accuracy for name, accuracy in found.items() if accuracy is not None}


def _between(known: set[str], votes: Votes) -> Iterator[tuple[str, str, float, int]]:
    for (a, ours), (b, theirs) in itertools.combinations(votes.items(), 2):
        both = [x for x in ours if x in known and ours[x] in _FIRST and theirs.get(x) in _FIRST]
        if both:
            yield a, b, sum(ours[x] == theirs[x] for x in both) / len(both), len(both)


def write_votes(path: Path, items: Sequence[Item], votes: Votes) -> int:
    """Write a row for each vote, as :mod:`diffalign.data.write` says; the number of rows, 0 where nothing is written.

    ``user_id`` is the annotator; ties have label 0.5, and skipped pairs no row.
    """
    rows = [(item, who, vote) for item in items for who, own in votes.items() if (vote := own.get(item.id)) in _FIRST]
    if not rows:
        return 0
    return write_pairs(path, (_row(*row) for row in rows), overwrite=True)


def _row(item: Item, annotator: str, vote: str) -> PairRow:
    models, seeds = item.models or (None, None), item.seeds or (None, None)
    return PairRow(
        caption=item.prompt,
        jpg_0=image_bytes(item.images[0]),
        jpg_1=image_bytes(item.images[1]),
        label_0=_FIRST[vote],
        id=f"{item.id}-{annotator}",
        scores=item.scores,
        seed_0=seeds[0],
        seed_1=seeds[1],
        model_0=models[0],
        model_1=models[1],
        user_id=annotator,
        source="diffalign label",
    )
