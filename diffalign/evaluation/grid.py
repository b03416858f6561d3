"""``diffalign grid``: models side by side, same prompts and seeds, with scores and win rates.

Columns are models, each at every guidance, number of steps and LoRA scale that was asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from diffalign.config import command_line, field
from diffalign.errors import UserError
from diffalign.evaluation.comparisons import Variant, column_names, rivals
from diffalign.evaluation.examples import spread
from diffalign.evaluation.folder import Case, SampleFolder, read_rows, write_rows
from diffalign.evaluation.html import page_of_rows, write_page
from diffalign.evaluation.judging import Judge
from diffalign.evaluation.page import make_grid, save_picture
from diffalign.evaluation.sampling import Drawer, cases_of, prompts_of
from diffalign.evaluation.stats import WinRate, win_rate
from diffalign.evaluation.sweep import SweepConfig, folder_names

__all__ = ["GridConfig", "GridResult", "make_grid", "run_grid"]

Floats = NDArray[np.float64]
_PICKED = {
    "first": "the first {shown} of {total} images of each model",
    "random": "{shown} of {total} images of each model, drawn at random with seed {seed}",
    "spread": "{shown} of {total} images of each model, evenly from the last column's largest gain to largest loss",
}


@dataclass(kw_only=True)
class GridConfig(SweepConfig):
    """Compare models side by side: rows are prompts and seeds, columns models at their settings."""

    scorer: list[str] = field([], help="Rewards to score by, such as shapes-checker; the first marks the winners.")
    score_batch_size: int = field(32, help="Images scored at once; as many are scored again after a kill.")
    rows: int = field(8, help="Rows to show; scores and win rates are over all images.")
    pick: Literal["first", "random", "spread"] = field(
        "first",
        help="Which rows grid.png shows: the first, some drawn at random by seed, or evenly from the largest gain of "
        "the last column to its largest loss. The picture says which.",
    )
    cell: int | None = field(None, help="Longest side of a shown image in pixels. Default: its own, in 160 to 384.")
    title: str | None = field(None, help="Title of the grid.")
    font: str | None = field(None, help="Font file for the labels, for scripts that the built-in font lacks.")
    theme: Literal["light", "dark", "both"] = field(
        "light", help="Colours of grid.png; both writes a grid-dark.png too. The page has both."
    )
    html: Literal["inside", "beside", "none"] = field(
        "inside", help="Write grid.html too: one file with the images inside, or one that links to them, or none."
    )
    html_rows: int | None = field(None, help="Rows of grid.html, from the first. Default: all.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "score_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.html_rows is not None and self.html_rows < 1:
            raise UserError(f"html_rows must be at least 1, got {self.html_rows}")
        if self.pick == "spread" and not self.scorer:
            raise UserError("--pick spread goes by gains: name a --scorer")


@dataclass(frozen=True)
class _Columns:
    """What is side by side.

    Attributes:
        variants, names: of each column.
        against: the place of the column that each is compared with; its own for the first.
        folders: of the images, by name.
    """

    variants: Sequence[Variant]
    names: Sequence[str]
    against: Sequence[int]
    folders: Mapping[str, SampleFolder]

    @property
    def several_rivals(self) -> bool:
        """Whether not all are compared with the first."""
        return any(self.against)


@dataclass(frozen=True)
class GridResult:
    """What ``run_grid`` made.

    Attributes:
        path: the picture.
        page: the HTML page; None where none was asked for.
        scores: of every image, by scorer and column; in the order of the cases.
        win_rates: of every column but the first against its rival, by scorer and column; see
            :func:`diffalign.evaluation.comparisons.rivals`.
        against: the rival of each column but the first.
    """

    path: Path
    scores: Mapping[str, Mapping[str, Floats]]
    win_rates: Mapping[str, Mapping[str, WinRate]]
    against: Mapping[str, str]
    page: Path | None = None

    def lines(self) -> Iterator[str]:
        """Means and win rates in words."""
        for scorer, by_model in self.scores.items():
            for model, scores in by_model.items():
                line = f"{scorer}: {model}: mean {np.nanmean(scores):.3f}"
                if model in self.win_rates[scorer]:
                    line += f", against {self.against[model]}: {self.win_rates[scorer][model]}"
                yield line


def run_grid(config: GridConfig) -> GridResult | None:
    """Draw what is missing, score, write ``grid.png``, ``grid.html`` and ``scores.jsonl``, and print the win rates.

    Returns:
        None on processes other than the first, which only help to draw.

    Raises:
        UserError: a model, scorer, prompt file or setting is wrong, or the folder holds other images.
    """
    plan, prompts, cases = config.variants(), prompts_of(config), cases_of(config)
    variants, root = list(plan), Path(config.output_dir)
    names = column_names(variants)
    drawer = Drawer(config)
    judge = Judge(config.scorer, root, prompts, cases, device=config.device, batch_size=config.score_batch_size)
    specs = [replace(spec, name=name) for spec, name in zip(plan.values(), names, strict=True)]
    drawn = drawer.draw_all(specs, cases, [root / name for name in folder_names(names)])
    drawer.release()
    columns = _Columns(variants, names, rivals(variants), dict(zip(names, drawn, strict=True)))
    judge.share(columns.folders)
    if not PartialState().is_main_process:
        return None
    scores = {member.name: judge.scores(member, columns.folders) for member in judge.members}
    rates = {name: _compare(by, columns, cases) for name, by in scores.items()}
    page = None if config.html == "none" else root / "grid.html"
    rival_names = {name: names[other] for k, (name, other) in enumerate(zip(names, columns.against, strict=True)) if k}
    result = GridResult(root / "grid.png", scores, rates, rival_names, page)
    _write_scores(root / "scores.jsonl", columns.folders, cases, scores)
    _draw(config, columns, cases, result)
    _write_html(config, columns, cases, result)
    for line in result.lines():
        print(line)
    print(result.path)
    if result.page is not None:
        print(result.page)
    return result


def _compare(scores: Mapping[str, Floats], columns: _Columns, cases: Sequence[Case]) -> dict[str, WinRate]:
    prompts, names = [case.index for case in cases], columns.names
    return {
        name: win_rate(scores[name], scores[names[other]], groups=prompts)
        for k, (name, other) in enumerate(zip(names, columns.against, strict=True))
        if k
    }


def _write_scores(
    path: Path,
    folders: Mapping[str, SampleFolder],
    cases: Sequence[Case],
    scores: Mapping[str, Mapping[str, Floats]],
) -> None:
    rows = [
        {
            "prompt_index": case.index,
            "prompt": case.prompt,
            "seed": case.seed,
            "model": model,
            "file": f"{folder.path.name}/{case.file}",
            "scores": {scorer: float(by_model[model][k]) for scorer, by_model in scores.items()},
        }
        for model, folder in folders.items()
        for k, case in enumerate(cases)
    ]
    write_rows(path, rows)


def _picked(config: GridConfig, columns: _Columns, cases: Sequence[Case], result: GridResult) -> list[int]:
    """Places of the cases that the picture shows."""
    if config.pick == "random":
        return sorted(random.Random(config.seed).sample(range(len(cases)), min(config.rows, len(cases))))
    if config.pick == "first":
        return list(range(min(config.rows, len(cases))))
    scores, last = next(iter(result.scores.values())), len(columns.names) - 1
    own, other = (scores[columns.names[k]] for k in (last, columns.against[last]))
    return spread(own - other if last else own, config.rows)


def _draw(config: GridConfig, columns: _Columns, cases: Sequence[Case], result: GridResult) -> None:
    places = _picked(config, columns, cases, result)
    shown = [cases[k] for k in places]
    first = next(iter(result.scores), None)
    several = len({case.index for case in shown}) < len(shown)
    alone = several and len({case.index for case in cases}) == 1
    tables = {
        name: [[float(by_column[column][k]) for column in columns.names] for k in places]
        for name, by_column in result.scores.items()
    }
    for theme in ("light", "dark") if config.theme == "both" else (config.theme,):
        picture = make_grid(
            [[columns.folders[name].image(case) for name in columns.names] for case in shown],
            # Of one prompt only the seeds differ from row to row.
            [f"seed {c.seed}" if alone else c.prompt + (f" (seed {c.seed})" if several else "") for c in shown],
            columns.names,
            # The name of a single scorer is in the footer.
            scores=None if first is None else tables if len(tables) > 1 else tables[first],
            against=columns.against,
            column_notes=None if first is None else [_note(result, first, name) for name in columns.names],
            title=config.title or (cases[0].prompt if alone else None),
            footer=_footer(config, columns, _PICKED[config.pick], len(shown), len(cases), list(result.scores)),
            cell=config.cell,
            font=config.font,
            theme=theme,
        )
        both = config.theme == "both" and theme == "dark"
        save_picture(picture, result.path.with_name("grid-dark.png") if both else result.path)


def _write_html(config: GridConfig, columns: _Columns, cases: Sequence[Case], result: GridResult) -> None:
    if result.page is None or config.html == "none":
        return
    first = next(iter(result.scores), None)
    page = page_of_rows(
        read_rows(result.page.parent / "scores.jsonl"),
        result.page.parent,
        config.html_rows,
        notes=[] if first is None else [_note(result, first, name) for name in columns.names],
        against=columns.against,
        title=config.title or "Models side by side",
        footer=_footer(
            config, columns, _PICKED["first"], len(cases[: config.html_rows]), len(cases), list(result.scores)
        ),
        command=command_line("diffalign grid", config),
    )
    write_page(result.page, page, config.html)


def _note(result: GridResult, scorer: str, model: str) -> str:
    note = f"mean {np.nanmean(result.scores[scorer][model]):.2f}"
    rate = result.win_rates[scorer].get(model)
    return note if rate is None else f"{note}\nwins {rate.rate:.2f} [{rate.low:.2f}, {rate.high:.2f}]"


def _footer(config: GridConfig, columns: _Columns, picked: str, shown: int, total: int, scorers: Sequence[str]) -> str:
    row = next(iter(next(iter(columns.folders.values())).rows.values()))
    seeds = (
        ", ".join(map(str, config.seeds)) if config.seeds is not None else f"from {config.seed}, one for each image"
    )
    counts, guidances = ({getattr(v, key) for v in columns.variants} for key in ("steps", "guidance"))
    parts = [
        f"{config.pretrained_model_name_or_path}, {row['scheduler']}"
        + (f", {row['num_inference_steps']} steps" if len(counts) == 1 else ""),
        *([f"guidance {row['guidance_scale']:g}"] if len(guidances) == 1 else []),
    ]
    parts[-1] += f", {row['width']}x{row['height']}, seeds {seeds}"
    some = picked.format(shown=shown, total=total, seed=config.seed)
    parts.append(some if shown < total else f"all {total} images of each model")
    if scorers:
        rival = "the first column"
        if columns.several_rivals:
            rival = f"{columns.variants[0].model} at the same settings (its own columns: against the first)"
        by = scorers[0] if len(scorers) == 1 else f"{', '.join(scorers)}; winners, means and wins are by {scorers[0]}"
        parts.append(f"scores by {by}, differences and wins against {rival}, wins with 95 % interval")
    return "; ".join(parts) + "."
