"""What a training run wrote of itself: rewards, held-out rewards and the distance to the reference, by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.evaluation.folder import read_rows

METRICS, HELDOUT = "metrics.jsonl", "heldout.jsonl"
_KL = ("kl_to_reference", "kl", "distance_to_reference")
_WITHOUT_REWARDS = ("loss", "implicit_accuracy", "margin", "chosen_error_vs_reference")
_HELDOUT = "heldout/"
_SMOOTH = 20
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """Numbers of one run by name, each as (step, value), rising in step.

    Attributes:
        run: name of its folder.
        metrics: of the training batches, as in ``metrics.jsonl``.
        heldout: means over the held-out prompts of each reward; empty where the run kept none.
    """

    run: str
    metrics: Mapping[str, Points]
    heldout: Mapping[str, Points]

    @property
    def trained(self) -> dict[str, Points]:
        """Mean rewards of the training batches, by "reward" (the total) and "reward/NAME"."""
        return {name: points for name, points in self.metrics.items() if name.partition("/")[0] == "reward"}

    @property
    def shown(self) -> dict[str, Points]:
        """What tells how the training went: its rewards; of a run that has none, what methods on pairs log."""
        names = [name for name in _WITHOUT_REWARDS if name in self.metrics]
        return self.trained or {name: self.metrics[name] for name in names}

    @property
    def kl(self) -> tuple[str, Points]:
        """How far the model is from its reference, and what the method calls that; empty where it is not measured."""
        return next(((name, self.metrics[name]) for name in _KL if name in self.metrics), ("", []))


def read_curves(runs: Sequence[Path]) -> list[Curves]:
    """The curves of runs.

    Raises:
        UserError: a folder holds no ``metrics.jsonl``.
    """
    return [_read(Path(run)) for run in runs]


def over_optimised(trained: Points, heldout: Points) -> float | None:
    """The step after which a held-out reward fell while the trained one still rose; None where it never did.

    That is the step of the held-out maximum, if it is not the last and the trained reward ended above what it was
    there. Noise makes such maxima too: it is where to look, not a test.
    """
    if len(heldout) < 3 or not trained:
        return None
    step = max(heldout, key=lambda point: point[1])[0]
    steps, values = np.array(trained, dtype=np.float64).T
    then = float(np.interp(step, steps, values))
    return step if step < heldout[-1][0] and values[-1] > then else None


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Means over the twentieth of the points that ends with each, so that the noise of batches does not hide it."""
    window = max(1, len(points) // _SMOOTH)
    sums = np.cumsum([0.0, *(value for _, value in points)])
    ends = np.arange(1, len(points) + 1)
    starts = np.maximum(ends - window, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def against(points: Points, x: Points) -> list[tuple[float, float]]:
    """The points with another quantity in place of the step, interpolated."""
    steps, values = np.array(x, dtype=np.float64).T
    return [(float(np.interp(step, steps, values)), value) for step, value in points]


def _read(folder: Path) -> Curves:
    file = folder / METRICS
    if not file.is_file():
        raise UserError(f"{folder} holds no {METRICS}: runs are the output folders of diffalign train")
    heldout: dict[str, Points] = {}
    if (folder / HELDOUT).is_file():
        for name, points in _numbers(folder / HELDOUT).items():
            if name.startswith(_HELDOUT):
                heldout[name.removeprefix(_HELDOUT)] = points
    return Curves(folder.name, _numbers(file), heldout)


def _numbers(file: Path) -> Mapping[str, Points]:
    """The numbers of a file's rows by name, each with its step."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(file):
        for name, value in row.items():
            if name != "step" and _is_number(value) and "step" in row:
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
