"""Stage 5: ``shapes-pairs``, the base model's own samples judged by the simulated annotators."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from diffalign.diffusion.random import key_seed
from diffalign.shapes.annotators import ANNOTATORS, OPPOSITES, View, prefer, utility
from diffalign.shapes.scene import parse, sample_captions

logger = logging.getLogger(__name__)

Sampler = Callable[[list[str], list[int]], NDArray[np.uint8]]
"""Prompts and seeds of N images to uint8 (N, 64, 64, 3)."""

SPLITS = {"train": 2200, "heldout": 500}
"""Pairs of each split."""
PAIRS_PER_PROMPT = {1: 0.3, 2: 0.3, 3: 0.4}
"""How many pairs a prompt gets, and how often."""
JPEG_QUALITY = 80
CHUNK = 256
MODEL_NAME = "shapes-sdxl"

SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("user_id", pa.int64()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("best_image_uid", pa.string()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("has_label", pa.bool_()),
        ("are_different", pa.bool_()),
    ]
)
"""Names and meanings of Pick-a-Pic; ``best_image_uid`` is "tie" for a tie, ``ranking_id`` joins a prompt's pairs."""


@dataclass(frozen=True)
class Session:
    """One prompt before one annotator: the images that are shown, in order of appearance."""

    ranking_id: int
    caption: str
    user_id: int
    seeds: tuple[int, ...]


def make_pairs(
    sampler: Sampler,
    folder: Path,
    work: Path,
    seed: int,
    splits: dict[str, int] = SPLITS,
    command: str = "python scripts/build_shapes.py",
) -> dict[str, dict[str, float]]:
    """Write ``train.parquet``, ``heldout.parquet`` and ``README.md`` into ``folder``; returns statistics by split.

    As on Pick-a-Pic's site, an annotator sees two images, and the one not chosen makes way for a new one (after a tie,
    the second). Captions of ``heldout`` are held out by :func:`diffalign.shapes.scene.is_heldout`. Samples are kept
    in ``work`` in chunks, so that a stopped run goes on where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    statistics = {}
    for split, count in splits.items():
        sessions = draw_sessions(split, count, seed)
        images = _sample_all(sampler, sessions, work, split)
        rows = [row for session in sessions for row in judge(session, images, seed)]
        path = folder / f"{split}.parquet"
        write_parquet(rows, path)
        statistics[split] = describe_rows(rows)
        logger.info("pairs %s: %s, %.2f MB", split, statistics[split], path.stat().st_size / 1e6)
    (folder / "README.md").write_text(card(statistics, seed, command), encoding="utf-8")
    return statistics


def draw_sessions(split: str, count: int, seed: int) -> list[Session]:
    """Sessions with ``count`` pairs in all, each with a caption of its own."""
    rng = np.random.default_rng([seed, 6, int(split == "heldout")])
    captions = iter(sample_captions(count, key_seed(seed, "pairs") % 2**32, heldout=split == "heldout"))
    sessions: list[Session] = []
    left = count
    while left:
        pairs = min(left, int(rng.choice(list(PAIRS_PER_PROMPT), p=list(PAIRS_PER_PROMPT.values()))))
        left -= pairs
        ranking_id, caption = len(sessions), next(captions)
        seeds = tuple(key_seed(seed, "pairs", caption, index) % 2**31 for index in range(pairs + 1))
        sessions.append(Session(ranking_id, caption, int(rng.choice(list(ANNOTATORS))), seeds))
    return sessions


def _sample_all(sampler: Sampler, sessions: Sequence[Session], work: Path, split: str) -> dict[tuple[str, int], bytes]:
    """Draw every image of the sessions, as JPEG, by caption and seed."""
    wanted = [(session.caption, image_seed) for session in sessions for image_seed in session.seeds]
    encoded: list[bytes] = []
    for start in range(0, len(wanted), CHUNK):
        part = wanted[start : start + CHUNK]
        path = work / f"pairs-{split}-{start:06d}-{hashlib.sha256(repr(part).encode()).hexdigest()[:12]}.npy"
        if not path.exists():
            images = sampler([caption for caption, _ in part], [image_seed for _, image_seed in part])
            unfinished = path.with_suffix(".tmp.npy")
            np.save(unfinished, images, allow_pickle=False)
            os.replace(unfinished, path)
        encoded += [to_jpeg(image) for image in np.load(path, allow_pickle=False)]
        logger.info("pairs %s: %d of %d images", split, len(encoded), len(wanted))
    return dict(zip(wanted, encoded, strict=True))


def to_jpeg(image: NDArray[np.uint8]) -> bytes:
    """A uint8 picture (64, 64, 3) as JPEG with full chroma."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4", optimize=True)
    return buffer.getvalue()


def judge(session: Session, images: dict[tuple[str, int], bytes], seed: int) -> list[dict[str, Any]]:
    """The rows of one session: what its annotator chose, pair by pair, looking at the JPEGs."""
    rng = np.random.default_rng(key_seed(seed, "judge", session.caption))
    jpegs = [images[session.caption, image_seed] for image_seed in session.seeds]
    views = [View.of(Image.open(io.BytesIO(data))) for data in jpegs]
    uids = [image_uid(session.caption, image_seed) for image_seed in session.seeds]
    shown = [0, 1]
    rows = []
    for newest in range(1, len(jpegs)):
        first, second = shown
        label = prefer(views[first], views[second], session.caption, session.user_id, rng)
        rows.append(
            {
                "caption": session.caption,
                "jpg_0": jpegs[first],
                "jpg_1": jpegs[second],
                "label_0": label,
                "label_1": 1 - label,
                "user_id": session.user_id,
                "image_0_uid": uids[first],
                "image_1_uid": uids[second],
                "best_image_uid": "tie" if label == 0.5 else uids[first if label == 1 else second],
                "model_0": MODEL_NAME,
                "model_1": MODEL_NAME,
                "ranking_id": session.ranking_id,
                "num_example_per_prompt": len(jpegs) - 1,
                "has_label": True,
                "are_different": True,
            }
        )
        shown[0 if label == 0 else 1] = newest + 1
    return rows


def image_uid(caption: str, image_seed: int) -> str:
    """A short name that belongs to one image."""
    return hashlib.sha256(f"{caption}\n{image_seed}".encode()).hexdigest()[:12]


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as one parquet file, complete or not at all."""
    unfinished = path.with_suffix(".tmp")
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA),
        unfinished,
        compression="zstd",
        compression_level=19,
        # An image that stays for the next pair is stored once, as long as the dictionary holds them all.
        dictionary_pagesize_limit=2**24,
    )
    os.replace(unfinished, path)


def describe_rows(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the card of the data set says about one split."""
    views: dict[bytes, View] = {}
    agree, faithful, opposed = [], [], []
    for row in rows:
        for jpeg in (row["jpg_0"], row["jpg_1"]):
            if jpeg not in views:
                views[jpeg] = View.of(Image.open(io.BytesIO(jpeg)))
        a, b = views[row["jpg_0"]], views[row["jpg_1"]]
        caption, spec = row["caption"], parse(row["caption"])
        faithful += [a.faithfulness(spec), b.faithfulness(spec)]
        if row["label_0"] != 0.5:
            agree.append((utility(a, caption) > utility(b, caption)) == (row["label_0"] == 1))
        first, second = (utility(a, caption, user) > utility(b, caption, user) for user in OPPOSITES)
        opposed.append(first != second)
    labels = [row["label_0"] for row in rows]
    users = Counter(row["user_id"] for row in rows)
    return {
        "pairs": len(rows),
        "prompts": len({row["caption"] for row in rows}),
        "images": len(views),
        "ties": float(np.mean([label == 0.5 for label in labels])),
        "first preferred": float(np.mean([label == 1 for label in labels])),
        "choice follows the mean utility": float(np.mean(agree)),
        "opposite users disagree": float(np.mean(opposed)),
        "checker score of the images": float(np.mean(faithful)),
        **{f"pairs of user {user}": users[user] for user in ANNOTATORS},
    }


def card(statistics: dict[str, dict[str, float]], seed: int, command: str) -> str:
    """The README of the data set."""
    splits = list(statistics)
    lines = [
        "# shapes-pairs",
        "",
        "Preference pairs in the columns of Pick-a-Pic. Images are samples of `shapes-sdxl` (25 DDIM steps with "
        "guidance), JPEG of quality 80 with full chroma. Choices are those of six simulated annotators, "
        "`diffalign/shapes/annotators.py`, whose tastes are written down there; users 5 and 6 are of opposite taste. "
        "Captions of `heldout` occur in no training data of the bundled models.",
        "",
        f"Made by `{command}` with seed {seed}.",
        "",
        "| | " + " | ".join(splits) + " |",
        "|---|" + "---|" * len(splits),
    ]
    for name in statistics[splits[0]]:
        values = (statistics[split][name] for split in splits)
        cells = (str(value) if isinstance(value, int) else f"{value:.3f}" for value in values)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
