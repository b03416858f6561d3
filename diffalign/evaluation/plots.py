"""Plots of an evaluation, by matplotlib without a window. The same numbers give the same files, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.errors import UserError
from diffalign.evaluation.comparisons import Axis, Scores, column_names
from diffalign.evaluation.curves import Curves, against, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED = "#1f2328", "#8a9099"
COLOURS = ("#4f6d8f", "#c8553d", "#3f8f6b", "#8a5fa8", "#b8862b", "#3a9aa8", "#a8517c", "#6b7a3a")
_AXES = {"guidance": "guidance", "steps": "denoising steps", "scale": "scale of the LoRA", "trained": "training step"}
_SIGMA = 1.959964


def need_matplotlib() -> None:
    """Raise a UserError if matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("plots need matplotlib: pip install 'diffalign[eval]', or --plots false") from (error)


def draw_plots(
    folder: Path, summary: Mapping[str, Any], table: Sequence[Scores], curves: Sequence[Curves]
) -> list[str]:
    """Draw what there is to draw into a folder, and return the names of the files."""
    need_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[], Figure | None]] = {
        "win-rates": lambda: win_rates(summary["comparisons"]["equal"]),
        "guidance": lambda: sweep(table, "guidance"),
        "steps": lambda: sweep(table, "steps"),
        "scale": lambda: sweep(table, "scale"),
        "trained": lambda: sweep(table, "trained"),
        "scores": lambda: distributions(table),
        "pareto": lambda: pareto(summary["fronts"]),
        "training": lambda: training(curves),
        "kl": lambda: over_kl(curves),
    }
    names = []
    for name, draw in plots.items():
        figure = draw()
        if figure is None:
            continue
        aside = folder / f".{name}.tmp.png"
        figure.savefig(aside, dpi=110, metadata={"Software": None})
        aside.replace(folder / f"{name}.png")
        names.append(f"{name}.png")
    return names


def win_rates(comparisons: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bars of the win rate of each comparison, with its interval; a panel for each reward."""
    rewards = list(dict.fromkeys(row["reward"] for row in comparisons))
    if not rewards:
        return None
    tallest = max(sum(row["reward"] == reward for row in comparisons) for reward in rewards)
    figure, axes = _panels(len(rewards), height=max(2.0, 0.9 + 0.36 * tallest))
    for axis, reward in zip(axes, rewards, strict=True):
        rows = [row for row in comparisons if row["reward"] == reward][::-1]
        rates = np.array([row["win"]["rate"] for row in rows])
        spans = [[row["win"]["rate"] - row["win"]["low"], row["win"]["high"] - row["win"]["rate"]] for row in rows]
        models = list(dict.fromkeys(row["model"] for row in comparisons))
        colours = [COLOURS[(1 + models.index(row["model"])) % len(COLOURS)] for row in rows]
        axis.barh(range(len(rows)), rates, color=colours, height=0.62, alpha=0.85)
        axis.errorbar(rates, range(len(rows)), xerr=np.abs(np.array(spans).T), fmt="none", ecolor=INK, capsize=3)
        axis.set_yticks(range(len(rows)), [f"{_short(row['model'])}, {row['setting']}" for row in rows])
        axis.axvline(0.5, color=INK, linewidth=1)
        axis.set_xlim(0, 1)
        _dress(axis, reward, f"win rate against {rows[0]['against']}", "")
    return figure


def sweep(table: Sequence[Scores], axis: Axis) -> Figure | None:
    """Mean score over one setting of what was drawn at several of it; a panel for each reward.

    What was drawn at one guidance or number of steps is a point. Scales and checkpoints are beside the first model,
    which has neither: a dotted line.
    """
    if all(len(variants) < 2 for variants in table[0].series(axis).values()):
        return None
    figure, axes = _panels(len(table), height=3.2)
    for panel, scores in zip(axes, table, strict=True):
        for number, (line, variants) in enumerate(scores.series(axis).items()):
            # Of the means of the prompts: images of one prompt are not independent.
            values = [scores.prompt_means(v) for v in variants]
            known = [(getattr(v, axis), x) for v, x in zip(variants, values, strict=True) if len(x)]
            means = [float(x.mean()) for _, x in known]
            errors = [_SIGMA * float(x.std()) / len(x) ** 0.5 for _, x in known]
            panel.errorbar(
                [at for at, _ in known], means, errors, color=COLOURS[number % len(COLOURS)], marker="o",
                markersize=4, capsize=2, label=_short(line),
            )  # fmt: skip
        if axis in ("scale", "trained"):
            for variant in scores.variants(scores.models[0]):
                if len(base := scores.prompt_means(variant)):
                    panel.axhline(float(base.mean()), color=MUTED, linewidth=1, linestyle=":")
        if axis == "steps":
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
        _dress(panel, scores.reward, _AXES[axis], "mean score")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def distributions(table: Sequence[Scores]) -> Figure | None:
    """Box plots of the scores of each model and setting; a panel for each reward. Whiskers: 5 and 95 %."""
    variants = list(table[0].by_variant)
    names = [_short(name, 36) for name in column_names(variants)]
    figure, axes = _panels(len(table), height=max(2.0, 0.9 + 0.34 * len(variants)))
    for axis, scores in zip(axes, table, strict=True):
        values = [scores.by_variant[v][np.isfinite(scores.by_variant[v])] for v in variants][::-1]
        boxes = axis.boxplot(values, orientation="horizontal", whis=(5, 95), widths=0.6, showfliers=False,
                             patch_artist=True, medianprops={"color": INK})  # fmt: skip
        for box, variant in zip(boxes["boxes"], reversed(variants), strict=True):
            box.set(facecolor=COLOURS[scores.models.index(variant.model) % len(COLOURS)], alpha=0.7, edgecolor=INK)
        axis.set_yticks(range(1, len(values) + 1), names[::-1])
        _dress(axis, scores.reward, "score", "")
    return figure


def pareto(fronts: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Each front over its two axes: points of one model joined, those of the front ringed and joined by a line.

    Small numbers are the scale of a LoRA, guidance and steps, whatever differs.
    """
    shown = [front for front in fronts if len(front["points"]) > 1]
    if not shown:
        return None
    figure, axes = _panels(len(shown), height=3.4)
    for axis, front in zip(axes, shown, strict=True):
        lines = list(dict.fromkeys(point["line"] for point in front["points"]))
        for number, line in enumerate(lines):
            points = [(point["x"], point["y"]) for point in front["points"] if point["line"] == line]
            xs, ys = zip(*points, strict=True)
            axis.plot(xs, ys, "o-", color=COLOURS[number % len(COLOURS)], markersize=4, linewidth=1,
                      label=_short(line))  # fmt: skip
        for point in front["points"]:
            axis.annotate(point["at"], (point["x"], point["y"]), (5, 5), textcoords="offset points", fontsize=7,
                          color=MUTED)  # fmt: skip
        best = sorted((point["x"], point["y"]) for point in front["points"] if point["front"])
        axis.plot(*zip(*best, strict=True), "--", color=INK, linewidth=1, marker="o", markersize=9,
                  markerfacecolor="none", label="front")  # fmt: skip
        _dress(axis, "", front["x"], front["y"])
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def training(curves: Sequence[Curves]) -> Figure | None:
    """Rewards over steps, of the batches thin and of held-out prompts thick; loss and margin where there are none."""
    return _over(curves, None)


def over_kl(curves: Sequence[Curves]) -> Figure | None:
    """The same over the distance to the reference, for the runs that measure it."""
    measured = [one for one in curves if one.kl[1]]
    return _over(measured, measured[0].kl[0]) if measured else None


def _over(curves: Sequence[Curves], kl: str | None) -> Figure | None:
    names = list(dict.fromkeys([n.removeprefix("reward/") for c in curves for n in c.shown]
                               + [n for c in curves for n in c.heldout]))  # fmt: skip
    if not names:
        return None
    figure, axes = _panels(len(names), height=3.0)
    for axis, name in zip(axes, names, strict=True):
        for number, one in enumerate(curves):
            colour = COLOURS[number % len(COLOURS)]
            batches = one.shown.get(name) or one.shown.get(f"reward/{name}", [])
            for points, style, kind in (
                (batches, {"linewidth": 0.6, "alpha": 0.35}, ""),
                (smoothed(batches), {"linewidth": 1.2}, "batches"),
                (one.heldout.get(name, []), {"linewidth": 2.0, "marker": "o", "markersize": 3}, "held out"),
            ):
                if points:
                    xs, ys = zip(*(points if kl is None else sorted(against(points, one.kl[1]))), strict=True)
                    label = f"{_short(one.run)}, {kind}" if kind else None
                    axis.plot(xs, ys, color=colour, label=label, **style)
        axis.legend(frameon=False, fontsize=7)
        _dress(axis, name, kl or "step", "")
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, at most three in a row, without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns, height * rows + 0.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.set_visible(False)
    return figure, grid[:count]


def _dress(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(visible=True, color="#e6e8eb", linewidth=0.6)
    axis.set_axisbelow(True)


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else name[: length - 3] + "..."
