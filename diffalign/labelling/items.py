"""Which pairs are shown: images of two models for equal prompts and seeds, of one model's candidates, or of a set."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.images import EncodedImage
from diffalign.data.records import Pair
from diffalign.errors import UserError
from diffalign.evaluation.folder import ROWS, read_rows

logger = logging.getLogger(__name__)
Scores = Mapping[Path, Mapping[str, float]]


@dataclass(frozen=True)
class Item:
    """A pair to be judged.

    Attributes:
        id: of its content: the prompt and both images, in this order.
        prompt: what both were drawn for.
        images: first and second.
        models: what drew them; None where nobody says.
        seeds: they were drawn with; None where nobody says.
        scores: of both, by reward.
        label: probability that the first is preferred, by the set the pair is of; None where it is of none.
    """

    id: str
    prompt: str
    images: tuple[EncodedImage, EncodedImage]
    models: tuple[str, str] | None = None
    seeds: tuple[int, int] | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    label: float | None = None


def find_items(
    sources: Sequence[str],
    *,
    max_pairs: int | None = None,
    seed: int = 0,
    scores: Sequence[str] = (),
    split: str = "train",
    columns: Mapping[str, str] | None = None,
) -> list[Item]:
    """The pairs of all sources.

    Args:
        sources: folders of drawn images (``samples.jsonl``), or folders that hold such, as grids and evaluations do:
            every two models are compared where prompt and seed are equal; of a single one, the images of each prompt
            are compared with each other. Or one set of preferences, as
            :func:`diffalign.data.readers.open_pairs` reads it.
        max_pairs: so many of them, drawn at random by ``seed``.
        scores: files of ``diffalign score``, beside the ``scores.jsonl`` that lie in the folders.
        split, columns: of a set of preferences.

    Raises:
        UserError: nothing there, no two images for one prompt, or an image that cannot be read.
    """
    folders = [_drawn_folders(Path(source).expanduser()) for source in sources]
    if all(folders):
        drawn = list(dict.fromkeys(itertools.chain.from_iterable(folders)))
        found = _of_folders(drawn, [Path(file).expanduser() for file in scores])
        total, chosen = len(found), _some(found, max_pairs, seed)
    elif len(sources) == 1:
        from diffalign.data.readers import PairSource, open_pairs  # imports torch, which folders need not wait for

        pairs = open_pairs(sources[0], ties="keep", split=split, columns=columns)
        if not isinstance(pairs, PairSource):
            raise UserError(f"{sources[0]} is read as a stream, which cannot be shuffled. Download it first.")
        total, chosen = len(pairs), [_of_pair(pairs[index]) for index in _some(range(len(pairs)), max_pairs, seed)]
    else:
        strange = next(source for source, inside in zip(sources, folders, strict=True) if not inside)
        raise UserError(
            f"{strange}: no samples.jsonl there or below. Give folders of drawn images, or one set of pairs."
        )
    if len(chosen) < total:
        logger.info("%d of %d pairs, drawn at random with seed %d (--max_pairs)", len(chosen), total, seed)
    return _distinct(chosen)


def _some(found: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    if limit is None or len(found) <= limit:
        return list(found)
    return [found[index] for index in sorted(random.Random(f"{seed} pairs").sample(range(len(found)), limit))]


def _drawn_folders(path: Path) -> list[Path]:
    if (path / ROWS).is_file():
        return [path]
    inside = {file.parent for pattern in (f"*/{ROWS}", f"*/*/{ROWS}") for file in path.glob(pattern)}
    return sorted(inside, key=lambda folder: (folder.name != "base", folder))


@dataclass(frozen=True)
class _Drawn:
    path: Path
    prompt: str
    seed: int
    model: str

    def item(self, other: _Drawn, scores: Scores) -> Item:
        ours, theirs = (scores.get(drawn.path.resolve(), {}) for drawn in (self, other))
        return Item(
            "",
            self.prompt,
            (EncodedImage(self.path, self.model), EncodedImage(other.path, other.model)),
            models=(self.model, other.model),
            seeds=(self.seed, other.seed),
            scores={name: (ours[name], theirs[name]) for name in ours if name in theirs},
        )


def _of_folders(folders: Sequence[Path], files: Sequence[Path]) -> list[Item]:
    names = [folder.name for folder in folders]
    drawn = [
        [
            _Drawn(folder / row["file"], row["prompt"], row["seed"], _model(folder, names))
            for row in read_rows(folder / ROWS)
        ]
        for folder in folders
    ]
    scores = _read_scores(folders, files)
    pairs = list(_candidates(drawn[0]) if len(drawn) == 1 else _rivals(drawn))
    if not pairs:
        where = ", ".join(map(str, folders))
        raise UserError(
            f"{where}: no two images for one prompt{'' if len(drawn) == 1 else ' and one seed'}. Draw all models with "
            "the same prompts and seeds, or one model with --num_images_per_prompt above 1."
        )
    return [first.item(second, scores) for first, second in pairs]


def _model(folder: Path, names: Sequence[str]) -> str:
    """The folder's name, with the one above where two are called alike."""
    return folder.name if names.count(folder.name) == 1 else f"{folder.resolve().parent.name}/{folder.name}"


def _rivals(drawn: Sequence[Sequence[_Drawn]]) -> Iterator[tuple[_Drawn, _Drawn]]:
    by_case = [{(image.prompt, image.seed): image for image in images} for images in drawn]
    for first, second in itertools.combinations(by_case, 2):
        yield from ((first[case], second[case]) for case in first if case in second)


def _candidates(drawn: Sequence[_Drawn]) -> Iterator[tuple[_Drawn, _Drawn]]:
    by_prompt: dict[str, list[_Drawn]] = {}
    for image in drawn:
        by_prompt.setdefault(image.prompt, []).append(image)
    for images in by_prompt.values():
        yield from itertools.combinations(images, 2)


def _read_scores(folders: Sequence[Path], files: Sequence[Path]) -> Scores:
    """Scores by image file: of the lists given, and of those in the folders and above them."""
    beside = [place / "scores.jsonl" for folder in folders for place in (folder.parent.parent, folder.parent, folder)]
    found: dict[Path, dict[str, float]] = {}
    for file in dict.fromkeys([*(file for file in beside if file.is_file()), *files]):
        if not file.is_file():
            raise UserError(f"{file}: no such file of scores. `diffalign score IMAGES --out {file}` writes one.")
        for row in read_rows(file):
            if not isinstance(row.get("file"), str) or not isinstance(row.get("scores"), dict):
                continue  # another kind of list of that name
            named = Path(row["file"])
            path = next((p for p in (file.parent / named, named) if p.is_file()), named)
            known = {name: float(score) for name, score in row["scores"].items() if score is not None}
            found.setdefault(path.resolve(), {}).update({name: s for name, s in known.items() if s == s})
    return found


def _of_pair(pair: Pair) -> Item:
    return Item("", pair.prompt, (pair.chosen, pair.rejected), label=pair.label)


def _distinct(items: Iterable[Item]) -> list[Item]:
    """The items with their ids; without those of equal images, and without repetitions."""
    result: dict[str, Item] = {}
    equal = 0
    for item in items:
        first, second = (image.inspect().digest for image in item.images)
        if first == second:
            equal += 1
            continue
        name = hashlib.blake2b("\0".join((item.prompt, first, second)).encode(), digest_size=8).hexdigest()
        values = {part: getattr(item, part) for part in ("prompt", "images", "models", "seeds", "scores", "label")}
        result.setdefault(name, Item(name, **values))
    if equal:
        logger.info("%d pairs of equal images left out", equal)
    if not result:
        raise UserError("all pairs are of equal images: there is nothing to choose. Were the models the same?")
    return list(result.values())
