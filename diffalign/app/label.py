"""``diffalign label PAIRS|FOLDERS --out FOLDER``: a local page on which people choose between two images."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.app import console
from diffalign.config import field, parse_args, write_text
from diffalign.errors import UserError


@dataclass(kw_only=True)
class LabelConfig:
    """Choose between two images, blind, on a page that only this machine sees; any number of people and sittings.

    Every vote is on disk before the next pair is shown. The folder then is a data set: --dataset_name of `diffalign
    train dpo`.
    """

    sources: list[str] = field(
        [],
        help="Two or more folders of drawn images, a grid's or an evaluation's folder, one folder with several images "
        "of each prompt, or a set of preference pairs. May also stand before the flags.",
    )
    output_dir: str = field(help="Folder for the votes and the pairs; --out for short. What is there goes on.")
    max_pairs: int | None = field(200, help="Show so many pairs, drawn at random; none for all.")
    seed: int = field(0, help="Draws the pairs, their order and their sides.")
    scores: list[str] = field([], help="Files of `diffalign score`, to learn which reward agrees with people.")
    split: str = field("train", help="Split of a set of pairs.")
    columns: dict[str, str] = field({}, help="Columns of a set of pairs, as prompt=my_caption.")
    port: int = field(8001, help="Port of the page; 0 for any free one.")
    serve: bool = field(True, help="Show the page; without it, only write pairs and results of the votes so far.")

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("what is to be labelled? diffalign label FOLDER FOLDER --out votes, or a set of pairs.")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise UserError(f"max_pairs must be at least 1, got {self.max_pairs}")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port must be in 0 to 65535, got {self.port}")


def main(argv: Sequence[str]) -> int:
    """Serve the page until interrupted, then write what the votes say."""
    config = parse_args(LabelConfig, console.plain_flags(argv, "sources"), prog="diffalign label")
    # Not console.set_up: no library that it quietens is needed here, and importing them takes seconds.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffalign").setLevel(logging.INFO)
    run(config)
    return 0


def run(config: LabelConfig) -> None:
    """See :func:`main`.

    Raises:
        UserError: a source, the folder or the port is wrong, or the page's packages are not installed.
    """
    from diffalign.labelling.items import find_items
    from diffalign.labelling.journal import FILE, Journal
    from diffalign.labelling.results import write_votes
    from diffalign.labelling.session import Session

    if config.serve:
        from diffalign.labelling.server import listen, serve

    out = Path(config.output_dir).expanduser()
    pairs = out / "train.parquet"
    if pairs.exists() and not (out / FILE).exists():
        raise UserError(f"{pairs} exists and is not of votes. Choose another --out.")
    items = find_items(
        config.sources,
        max_pairs=config.max_pairs,
        seed=config.seed,
        scores=config.scores,
        split=config.split,
        columns=config.columns,
    )
    journal = Journal(out)
    try:
        session = Session(items, journal, config.seed)
        if config.serve:
            with listen(config.port) as listening:
                print(f"{len(items)} pairs: http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
                print("Ctrl+C stops, writes the pairs and says what the votes say", flush=True)
                serve(session, listening)
        results = session.results()
        count = write_votes(pairs, items, journal.votes)
    finally:
        journal.close()
    for line in results.lines():
        print(line)
    strange = len({name for own in journal.votes.values() for name in own} - {item.id for item in items})
    if strange:
        print(
            f"{strange} pairs with votes are not among these {len(items)}: their votes stay, but are not counted here"
        )
    if not count:
        print("no votes yet")
        return
    write_text(out / "results.json", json.dumps(results.plain(), indent=2, ensure_ascii=False) + "\n")
    print(f"{count} pairs in {pairs}: diffalign train dpo --dataset_name {out} ...")
