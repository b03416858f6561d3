#!/usr/bin/env python
"""Pairs whose rejected image was drawn for another prompt, to see what captions of single images are worth.

    python benchmarks/mismatched_pairs.py runs/shapes-mismatched
    python benchmarks/shapes_methods.py --methods dpo dcpo --dataset_name runs/shapes-mismatched --seeds 0 1 2 \\
        --out benchmarks/results/shapes_methods.json

The chosen image of every bundled training pair stays; the rejected one is swapped for the rejected image of the pair
half the set further on, wherever that has another prompt. It lost its own comparison, so it is the worse picture, but
what it shows was asked for by somebody else. Conditioned on the pair's prompt it is wrong whatever its quality;
conditioned on a caption of its own, what is left is that it is worse.
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
            yield PairRow.of(pair, jpg_1=image_bytes(other.rejected), label_0=1.0, margin=None, source="mismatched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.parquet is written")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{write_pairs(folder / 'train.parquet', mismatched())} pairs in {folder}")


if __name__ == "__main__":
    main()
