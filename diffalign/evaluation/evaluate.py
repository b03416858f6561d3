"""``diffalign eval``: models x prompts x seeds -> images -> scores -> statistics, plots and a report.

The folder holds ``images/`` (a folder of each model at each setting, see :mod:`diffalign.evaluation.folder`),
``cache/`` (scores by content of the image), ``scores.jsonl`` (a row an image), ``images.html`` (all images side by
side), ``summary.json``, ``report.md``, ``examples.png`` and ``plots/``. Images and scores are kept as they are made,
and everything else is made from them: a run that was killed makes no image and no score twice, and ends with the
report of one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from diffalign.config import command_line, save_yaml, to_dict
from diffalign.data.prompts import Prompt
from diffalign.evaluation.comparisons import Scores, Variant, rivals
from diffalign.evaluation.curves import Curves, read_curves
from diffalign.evaluation.distribution import Realism
from diffalign.evaluation.eval_config import EvalConfig
from diffalign.evaluation.examples import draw_examples
from diffalign.evaluation.folder import Case, SampleFolder, read_rows, write_atomically, write_rows
from diffalign.evaluation.html import page_of_rows, write_page
from diffalign.evaluation.judging import Judge, own_device
from diffalign.evaluation.report import render
from diffalign.evaluation.sampling import Drawer, cases_of, prompts_of
from diffalign.evaluation.score_file import plain
from diffalign.evaluation.summary import CLIP_DISTANCE, LPIPS, VENDI, Diversities, summarise
from diffalign.evaluation.sweep import folder_names
from diffalign.rewards.base import Reward
from diffalign.rewards.diversity import Diversity
from diffalign.rewards.lpips import LPIPSDiversity

__all__ = ["EvalConfig", "EvalResult", "run_eval"]

Floats = NDArray[np.float64]
IMAGES, PLOTS, EXAMPLES = "images", "plots", "examples.png"


@dataclass(frozen=True)
class EvalResult:
    """Where the report is, and what ``summary.json`` holds."""

    report: Path
    summary: Mapping[str, Any]


def run_eval(config: EvalConfig) -> EvalResult | None:
    """Draw what is missing, score what is missing, and write the report.

    Returns:
        None on processes other than the first, which only help to draw and to score.

    Raises:
        UserError: a model, reward, prompt or setting is wrong, or the folder holds other images; before anything is
            drawn, as far as it can be known.
        RewardError: an image cannot be scored, and the policy does not bear it. What was scored is kept.
    """
    if config.plots:
        from diffalign.evaluation.plots import need_matplotlib

        need_matplotlib()
    variants, prompts, cases = config.variants(), prompts_of(config), cases_of(config)
    root = Path(config.output_dir)
    drawer = Drawer(config)
    judge = _judge(config, prompts, cases)
    first = PartialState().is_main_process
    realism = None
    if first and config.reference_images is not None:
        realism = Realism(config.reference_images, len(cases), config.reference_features, config.device)
    names = folder_names([f"{v.model}-g{v.guidance:g}-s{v.steps}" for v in variants])
    drawn = drawer.draw_all(list(variants.values()), cases, [root / IMAGES / name for name in names])
    folders = dict(zip(variants, drawn, strict=True))
    drawer.release()
    judge.share(folders)
    if not first:
        return None
    save_yaml(to_dict(config), root / "config.yaml")
    scores = {member.name: judge.scores(member, folders) for member in judge.members}
    diversities = _diversities(judge, folders)
    table = [_aligned(name, by_variant, cases, prompts) for name, by_variant in scores.items()]
    _write_scores(root, folders, cases, prompts, scores, diversities)
    curves = read_curves(config.runs)
    roles = config.roles(list(variants.values()))
    summary = summarise(
        table,
        diversities=diversities,
        distances={} if realism is None else realism.distances(folders, cases),
        curves=curves,
        # Roles are known by the text of the list, in its order.
        rewards=[
            {"name": member.name, "identity": member.reward.identity, "role": role}
            for member, role in zip(judge.members, roles.values(), strict=True)
        ],
        config=config,
    )
    result = EvalResult(root / "report.md", summary)
    _write_report(config, result, table, curves, folders, cases)
    return result


def _judge(config: EvalConfig, prompts: Sequence[Prompt], cases: Sequence[Case]) -> Judge:
    return Judge(
        config.rewards,
        Path(config.output_dir),
        prompts,
        cases,
        groupwise=_measures(config, cases),
        policy=config.policy(),
        device=config.device,
        batch_size=config.score_batch_size,
    )


def _measures(config: EvalConfig, cases: Sequence[Case]) -> dict[str, Reward]:
    """What compares the images of one prompt; nothing where each has one.

    Raises:
        UserError: LPIPS's weights are not there, and cannot be had.
    """
    if len({case.index for case in cases}) == len(cases):
        return {}
    options: dict[str, Any] = {"device": own_device(config.device), "batch_size": config.score_batch_size}
    found: dict[str, Reward] = (
        {} if config.diversity is None else {CLIP_DISTANCE: Diversity(config.diversity, **options)}
    )
    if config.lpips is not None:
        found[LPIPS] = LPIPSDiversity(config.lpips, **options)
        with PartialState().main_process_first():  # one downloads
            found[LPIPS].prepare()
        found[LPIPS].close()
    return found


def _diversities(judge: Judge, folders: Mapping[Variant, SampleFolder]) -> Diversities | None:
    """Mean distances, Vendi scores and LPIPS by model and prompt; None where nothing was measured."""
    groups = [case.index for case in judge.cases]
    order = list(dict.fromkeys(groups))
    rows = [np.array([k for k, group in enumerate(groups) if group == index]) for index in order]
    found: dict[str, dict[Variant, Floats]] = {}
    for member in judge.groupwise:
        for variant, (rewards, details) in judge.outputs(member, folders).items():
            found.setdefault(member.name, {})[variant] = np.array([np.mean(rewards[own]) for own in rows])
            if "vendi" in details:
                found.setdefault(VENDI, {})[variant] = np.array([details["vendi"][own[0]] for own in rows])
    return Diversities(order, found) if found else None


def _category(prompt: Prompt) -> str:
    value = prompt.metadata.get("category")
    return "" if value is None else str(value)


def _aligned(
    name: str, by_variant: Mapping[Variant, Floats], cases: Sequence[Case], prompts: Sequence[Prompt]
) -> Scores:
    indices = np.array([case.index for case in cases], dtype=np.int64)
    return Scores(name, by_variant, indices, [_category(prompts[case.index]) for case in cases])


def _write_scores(
    root: Path,
    folders: Mapping[Variant, SampleFolder],
    cases: Sequence[Case],
    prompts: Sequence[Prompt],
    scores: Mapping[str, Mapping[Variant, Floats]],
    diversities: Diversities | None,
) -> None:
    write_rows(
        root / "scores.jsonl",
        [
            {
                "prompt_index": case.index,
                "prompt": case.prompt,
                "category": _category(prompts[case.index]),
                "seed": case.seed,
                "model": variant.name,
                "base_name": variant.model,
                "guidance_scale": variant.guidance,
                "num_inference_steps": variant.steps,
                "file": f"{IMAGES}/{folder.path.name}/{case.file}",
                "scores": {name: _number(by_variant[variant][k]) for name, by_variant in scores.items()},
            }
            for variant, folder in folders.items()
            for k, case in enumerate(cases)
        ],
    )
    if diversities is None:
        return
    rows = [
        {
            "model": variant.name,
            "prompt_index": index,
            **{name: plain(by_variant[variant][k]) for name, by_variant in diversities.values.items()},
        }
        for variant in folders
        for k, index in enumerate(diversities.prompts)
    ]
    write_rows(root / "diversity.jsonl", rows)


def _number(score: float) -> float | None:
    return plain(score) if math.isfinite(score) else None


def _write_report(
    config: EvalConfig,
    result: EvalResult,
    table: Sequence[Scores],
    curves: Sequence[Curves],
    folders: Mapping[Variant, SampleFolder],
    cases: Sequence[Case],
) -> None:
    root = result.report.parent
    pictures = []
    if config.example_rows:
        pictures.append(draw_examples(root / EXAMPLES, table, folders, cases, config.example_rows))
    if config.plots:
        from diffalign.evaluation.plots import draw_plots

        names = draw_plots(root / PLOTS, result.summary, table, curves)
        pictures += [f"{PLOTS}/{name}" for name in names]
    text = json.dumps(result.summary, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(root / "summary.json", text + "\n")
    write_atomically(result.report, render(result.summary, pictures))
    print(result.report)
    if config.html != "none":
        variants = list(folders)
        page = page_of_rows(
            read_rows(root / "scores.jsonl"),
            root,
            against=rivals(variants),
            title=config.title,
            footer="All images and their scores, by model and setting.",
            command=command_line("diffalign eval", config),
        )
        write_page(root / "images.html", page, config.html)
        print(root / "images.html")
    for line in result.summary["conclusions"]:
        print(line)
