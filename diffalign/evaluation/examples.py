"""The report's picture: rows spread evenly from the largest gain to the largest loss, so that nothing is picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.comparisons import Scores, Variant, column_names, mean_of, rivals
from diffalign.evaluation.folder import Case, SampleFolder
from diffalign.evaluation.page import make_grid, save_picture

_MOST_COLUMNS = 6


def draw_examples(
    path: Path,
    table: Sequence[Scores],
    folders: Mapping[Variant, SampleFolder],
    cases: Sequence[Case],
    rows: int = 6,
) -> str:
    """Draw a grid of every model at its best setting by the first reward; the name of the file.

    Rows are spread over the order of the second column's gain over the first by that reward; over the order of the
    scores, where there is one column.
    """
    first = table[0]
    variants = [max(first.variants(m), key=lambda v: mean_of(first.by_variant[v])) for m in first.models]
    shown = variants[:_MOST_COLUMNS]
    margin = first.by_variant[shown[0]] if len(shown) < 2 else (
        first.by_variant[shown[1]] - first.by_variant[shown[0]]
    )  # fmt: skip
    chosen = [cases[k] for k in spread(margin, rows)]
    places = {case: k for k, case in enumerate(cases)}
    names = column_names(shown)
    order = "score" if len(shown) < 2 else f"gain of {names[1]} over {names[0]}"
    rest = (
        f" {len(variants) - len(shown)} more models are in the page of all images."
        if len(shown) < len(variants)
        else ""
    )
    picture = make_grid(
        [[folders[variant].image(case) for variant in shown] for case in chosen],
        [case.prompt for case in chosen],
        names,
        scores={
            scores.reward: [[float(scores.by_variant[v][places[case]]) for v in shown] for case in chosen]
            for scores in table
        },
        against=rivals(shown),
        footer=f"{len(chosen)} of {len(cases)}, evenly from the largest to the smallest {order} by {first.reward}; "
        f"each model at the setting with its best mean.{rest}",
    )
    save_picture(picture, path)
    return path.name


def spread(values: NDArray[np.float64], count: int) -> list[int]:
    """Places of at most ``count`` finite values, from the largest to the smallest, evenly over their order."""
    known = [int(k) for k in np.argsort(-values, kind="stable") if np.isfinite(values[k])]
    places = np.linspace(0, len(known) - 1, min(count, len(known))).round().astype(int)
    return [known[k] for k in places]
