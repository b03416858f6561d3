"""``diffalign grid``: models side by side, same prompts and seeds, with scores and win rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from diffalign.config import command_line, field
from diffalign.errors import UserError
from diffalign.evaluation.folder import Case, SampleFolder, read_rows, write_rows
from diffalign.evaluation.html import page_of_rows, write_page
from diffalign.evaluation.models import ModelSpec, unique_names
from diffalign.evaluation.page import make_grid
from diffalign.evaluation.sampling import DrawConfig, Drawer, cases_of, slug
from diffalign.evaluation.stats import WinRate, win_rate
from diffalign.rewards import Reward, guarded, load_reward

__all__ = ["GridConfig", "GridResult", "make_grid", "run_grid"]

_IN_MEMORY = 64
Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class GridConfig(DrawConfig):
    """Compare models side by side: rows are prompts, columns models, and every row has one seed."""

    models: list[str] = field(
        [],
        help="Columns beside the base: LoRAs as PATH, PATH@SCALE or NAME=PATH@SCALE, several on one model joined by "
        "+; or pipelines; or folders of fine-tuned denoisers.",
    )
    base: bool = field(True, help="Make the base model the first column. The others are compared with the first.")
    scorer: list[str] = field([], help="Rewards to score by, such as shapes-checker; the first is shown in the grid.")
    rows: int = field(8, help="Rows to show, from the first; scores and win rates are over all images.")
    cell: int | None = field(None, help="Longest side of a shown image in pixels. Default: its own, in 160 to 384.")
    title: str | None = field(None, help="Title of the grid.")
    font: str | None = field(None, help="Font file for the labels, for scripts that the built-in font lacks.")
    html: Literal["inside", "beside", "none"] = field(
        "inside", help="Write grid.html too: one file with the images inside, or one that links to them, or none."
    )
    html_rows: int | None = field(None, help="Rows of grid.html, from the first. Default: all.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise UserError(f"rows must be at least 1, got {self.rows}")
        if self.html_rows is not None and self.html_rows < 1:
            raise UserError(f"html_rows must be at least 1, got {self.html_rows}")
        if not self.base and not self.models:
            raise UserError("nothing to compare: give --models, or leave the base in")

    def specs(self) -> list[ModelSpec]:
        """The models, one for each column."""
        parsed = [ModelSpec.parse(text) for text in self.models]
        if self.base and ModelSpec("base") not in parsed:
            parsed.insert(0, ModelSpec("base"))
        return unique_names(parsed)


@dataclass(frozen=True)
class GridResult:
    """What ``run_grid`` made.

    Attributes:
        path: the picture.
        page: the HTML page; None where none was asked for.
        scores: of every image, by scorer and model; in the order of the cases; NaN where scoring failed.
        win_rates: of every model but the first against the first, by scorer and model.
    """

    path: Path
    scores: Mapping[str, Mapping[str, Floats]]
    win_rates: Mapping[str, Mapping[str, WinRate]]
    page: Path | None = None

    def lines(self) -> Iterator[str]:
        """Means and win rates in words."""
        for scorer, by_model in self.scores.items():
            first = next(iter(by_model))
            for model, scores in by_model.items():
                line = f"{scorer}: {model}: mean {np.nanmean(scores):.3f}"
                if model in self.win_rates[scorer]:
                    line += f", against {first}: {self.win_rates[scorer][model]}"
                yield line


def run_grid(config: GridConfig) -> GridResult | None:
    """Draw what is missing, score, write ``grid.png``, ``grid.html`` and ``scores.jsonl``, and print the win rates.

    Returns:
        None on processes other than the first, which only help to draw.

    Raises:
        UserError: a model, scorer, prompt file or setting is wrong, or the folder holds other images.
    """
    specs, cases = config.specs(), cases_of(config)
    # Before hours of drawing, find out that a scorer's name is wrong.
    scorers = {name: load_reward(name, device=config.device) for name in config.scorer}
    for reward in scorers.values():
        reward.check_prompts([case.prompt for case in cases])
    drawer, root = Drawer(config), Path(config.output_dir)
    folders = {spec.name: drawer.draw(spec, cases, root / _folder(spec, specs)) for spec in specs}
    if not PartialState().is_main_process:
        return None
    drawer.release()
    scores = {name: _score(reward, folders, cases) for name, reward in scorers.items()}
    rates = {name: _compare(by, cases) for name, by in scores.items()}
    result = GridResult(root / "grid.png", scores, rates, None if config.html == "none" else root / "grid.html")
    _write_scores(root / "scores.jsonl", folders, cases, scores)
    _draw(config, specs, folders, cases, result)
    _write_html(config, folders, cases, result)
    for line in result.lines():
        print(line)
    print(result.path)
    if result.page is not None:
        print(result.page)
    return result


def _score(reward: Reward, folders: Mapping[str, SampleFolder], cases: Sequence[Case]) -> dict[str, Floats]:
    scores: dict[str, Floats] = {}
    try:
        for model, folder in folders.items():
            parts = []
            for start in range(0, len(cases), _IN_MEMORY):
                chunk = cases[start : start + _IN_MEMORY]
                images = [folder.image(case) for case in chunk]
                output = guarded(reward, images, [case.prompt for case in chunk])
                parts.append(output.rewards.double().cpu().numpy())
            scores[model] = np.concatenate(parts)
    finally:
        reward.close()
    return scores


def _compare(scores: Mapping[str, Floats], cases: Sequence[Case]) -> dict[str, WinRate]:
    first, *others = scores
    prompts = [case.index for case in cases]
    return {model: win_rate(scores[model], scores[first], groups=prompts) for model in others}


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


def _draw(
    config: GridConfig,
    specs: Sequence[ModelSpec],
    folders: Mapping[str, SampleFolder],
    cases: Sequence[Case],
    result: GridResult,
) -> None:
    shown = cases[: config.rows]
    shared = next(iter(result.scores), None)
    columns = None if shared is None else result.scores[shared]
    several = len({case.index for case in shown}) < len(shown)
    page = make_grid(
        [[folders[spec.name].image(case) for spec in specs] for case in shown],
        [case.prompt + (f" (seed {case.seed})" if several else "") for case in shown],
        [spec.name for spec in specs],
        scores=None
        if columns is None
        else [[float(columns[spec.name][k]) for spec in specs] for k in range(len(shown))],
        column_notes=None if shared is None else [_note(result, shared, spec.name) for spec in specs],
        title=config.title,
        footer=_footer(config, folders, len(shown), len(cases), shared),
        cell=config.cell,
        font=config.font,
    )
    aside = result.path.with_name(".grid.tmp.png")
    page.save(aside)
    aside.replace(result.path)


def _write_html(
    config: GridConfig, folders: Mapping[str, SampleFolder], cases: Sequence[Case], result: GridResult
) -> None:
    if result.page is None or config.html == "none":
        return
    shared = next(iter(result.scores), None)
    page = page_of_rows(
        read_rows(result.page.parent / "scores.jsonl"),
        result.page.parent,
        config.html_rows,
        notes=[] if shared is None else [_note(result, shared, model) for model in folders],
        title=config.title or "Models side by side",
        footer=_footer(config, folders, len(cases[: config.html_rows]), len(cases), shared),
        command=command_line("diffalign grid", config),
    )
    write_page(result.page, page, config.html)


def _note(result: GridResult, scorer: str, model: str) -> str:
    note = f"mean {np.nanmean(result.scores[scorer][model]):.2f}"
    rate = result.win_rates[scorer].get(model)
    return note if rate is None else f"{note}\nwins {rate.rate:.2f} [{rate.low:.2f}, {rate.high:.2f}]"


def _footer(
    config: GridConfig, folders: Mapping[str, SampleFolder], shown: int, total: int, scorer: str | None
) -> str:
    row = next(iter(next(iter(folders.values())).rows.values()))
    seeds = (
        ", ".join(map(str, config.seeds)) if config.seeds is not None else f"from {config.seed}, one for each image"
    )
    parts = [
        f"{config.pretrained_model_name_or_path}, {row['scheduler']}, {config.num_inference_steps} steps",
        f"guidance {config.guidance_scale:g}, {row['width']}x{row['height']}, seeds {seeds}",
        f"the first {shown} of {total} images of each model" if shown < total else f"all {total} images of each model",
    ]
    if scorer is not None:
        parts.append(f"scores by {scorer}, differences and wins against the first column, wins with 95 % interval")
    return "; ".join(parts) + "."


def _folder(spec: ModelSpec, specs: Sequence[ModelSpec]) -> str:
    """Folder of a model; numbered where two names differ only in what a folder cannot be called."""
    name = slug(spec.name)
    before = [slug(other.name).lower() for other in specs[: specs.index(spec)]]
    return name if name.lower() not in before else f"{name}-{specs.index(spec)}"
