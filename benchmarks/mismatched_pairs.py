#!/usr/bin/env python
"""Pairs whose rejected image was drawn for another prompt, to see what captions of single images are worth.

    python benchmarks/mismatched_pairs.py runs/shapes-mismatched
    python benchmarks/shapes_methods.py --methods dpo dcpo --dataset_name runs/shapes-mismatched --seeds 0 1 2 \\
        --out benchmarks/results/shapes_methods.json

The chosen image of every bundled training pair stays; the rejected one is swapped for the chosen image of the pair
half the set further on, wherever that has another prompt. So the rejected image is as good a picture as the chosen
one, and what is wrong with it is that it does not fit: conditioned on the pair's prompt, it is off; on a caption of
its own, it is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from diffalign.data.readers import PairSource, open_pairs
from diffalign.data.write import PairRow, image_bytes, write_pairs


def mismatched() -> Iterator[PairRow]:
    """The rows, one for each bundled training pair."""
    pairs = open_pairs("shapes-pairs")
    assert isinstance(pairs, PairSource)
    count = len(pairs)
    for index in range(count):
        pair, other = pairs[index], pairs[(index + count // 2) % count]
        if other.prompt != pair.prompt:
            yield PairRow.of(pair, jpg_1=image_bytes(other.chosen), label_0=1.0, margin=None, source="mismatched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.parquet is written")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{write_pairs(folder / 'train.parquet', mismatched())} pairs in {folder}")


if __name__ == "__main__":
    main()
