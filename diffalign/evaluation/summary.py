"""From scores to what can be said of them: ``summary.json``, and the sentences at the top of the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.config import command_line
from diffalign.evaluation.comparisons import (
    Comparison,
    Scores,
    Variant,
    at_equal_settings,
    at_their_best,
    by_category,
    corrected,
    mean_of,
    per_prompt,
)
from diffalign.evaluation.curves import Curves, over_optimised
from diffalign.evaluation.eval_config import EvalConfig
from diffalign.evaluation.pareto import pareto_front
from diffalign.evaluation.sampling import versions
from diffalign.evaluation.stats import paired_difference

Floats = NDArray[np.float64]
SIGNIFICANT = 0.05
_VENDI_ALARM = 0.8
"""Share of the baseline's Vendi score below which the report warns."""


@dataclass(frozen=True)
class Diversities:
    """How different the images of each prompt are.

    Attributes:
        prompts: indices (p,).
        distance: mean pairwise 1 - cosine of the prompt's images by CLIP, (p,) of each variant.
        vendi: effective number of different images, (p,) of each variant.
    """

    prompts: Sequence[int]
    distance: Mapping[Variant, Floats]
    vendi: Mapping[Variant, Floats]


def summarise(
    table: Sequence[Scores],
    *,
    diversities: Diversities | None,
    distances: Mapping[Variant, Mapping[str, float]],
    curves: Sequence[Curves],
    rewards: Sequence[Mapping[str, str]],
    config: EvalConfig,
) -> dict[str, Any]:
    """Everything that the report says, as plain values for JSON."""
    baseline = table[0].models[0]
    families = _families(table, baseline, config)
    prompts, images = len(np.unique(table[0].prompts)), len(table[0].prompts)
    summary: dict[str, Any] = {
        "title": config.title,
        "command": command_line("diffalign eval", config),
        "versions": versions(),
        "baseline": baseline,
        "prompts": prompts,
        "images_of_each_model": images,
        "images_per_prompt": images / prompts,
        "correction": config.correction,
        "bootstrap_draws": config.bootstrap_draws,
        "rewards": list(rewards),
        "models": [_model(variant, table, diversities, distances) for variant in table[0].by_variant],
        "comparisons": {name: [plain_comparison(c) for c in found] for name, found in families.items()},
        "diversity": _diversity_changes(diversities, baseline, config.bootstrap_draws),
        "fronts": _fronts(table, diversities),
        "runs": [_run(one) for one in curves],
        "guidance": _guidance(table),
    }
    summary["warnings"] = warnings(table, families, rewards, summary["diversity"], config)
    summary["conclusions"] = conclusions(families)
    return summary


def _families(table: Sequence[Scores], baseline: str, config: EvalConfig) -> dict[str, list[Comparison]]:
    """Comparisons of all rewards by kind; p values are adjusted within each."""
    kinds: dict[str, Callable[[Scores, str, int], list[Comparison]]] = {
        "best": at_their_best,
        "equal": at_equal_settings,
        "categories": by_category,
    }
    return {
        name: corrected(
            [one for scores in table for one in kind(scores, baseline, config.bootstrap_draws)], config.correction
        )
        for name, kind in kinds.items()
    }


def plain_comparison(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values; what is not a finite number becomes null."""
    return {key: _plain(value) for key, value in dataclasses.asdict(comparison).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _model(
    variant: Variant,
    table: Sequence[Scores],
    diversities: Diversities | None,
    distances: Mapping[Variant, Mapping[str, float]],
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": variant.name,
        "model": variant.model,
        "guidance_scale": variant.guidance,
        "num_inference_steps": variant.steps,
        "scores": {scores.reward: _described(scores.by_variant[variant], scores.prompts) for scores in table},
        **distances.get(variant, {}),
    }
    if diversities is not None:
        found["distance"] = float(np.nanmean(diversities.distance[variant]))
        found["vendi"] = float(np.nanmean(diversities.vendi[variant]))
    return found


def _described(values: Floats, prompts: NDArray[np.int64]) -> dict[str, Any]:
    """Mean over images, median over prompts of the prompts' medians, and counts."""
    known = np.isfinite(values)
    if not known.any():
        return {"mean": None, "median": None, "std": None, "n": 0, "failed": len(values)}
    medians = per_prompt(values[known], prompts[known].tolist())
    return {
        "mean": float(values[known].mean()),
        "median": float(np.median(medians)),
        "std": float(values[known].std()),
        "n": int(known.sum()),
        "failed": int((~known).sum()),
    }


def _diversity_changes(diversities: Diversities | None, baseline: str, draws: int) -> list[dict[str, Any]]:
    """Of each variant against the baseline's of the same guidance, or its only one: the change over prompts."""
    if diversities is None:
        return []
    own = [variant for variant in diversities.distance if variant.model == baseline]
    rows = []
    for variant, distance in diversities.distance.items():
        same = [other for other in own if other.guidance == variant.guidance] or (own if len(own) == 1 else [])
        if variant.model == baseline or not same:
            continue
        both = np.isfinite(distance) & np.isfinite(diversities.distance[same[0]])
        change = paired_difference(distance[both], diversities.distance[same[0]][both], draws=draws)
        vendi = float(np.nanmean(diversities.vendi[variant]) / np.nanmean(diversities.vendi[same[0]]))
        rows.append(
            {"model": variant.name, "against": same[0].name, "vendi_ratio": vendi, **_plain_difference(change)}
        )
    return rows


def _plain_difference(change: Any) -> dict[str, Any]:
    return {key: _plain(value) for key, value in dataclasses.asdict(change).items()}


def _fronts(table: Sequence[Scores], diversities: Diversities | None) -> list[dict[str, Any]]:
    """For each reward: which variants nothing beats in it and in diversity; or, without that, in the second reward."""
    variants = list(table[0].by_variant)

    def means(scores: Scores) -> list[float]:
        return [mean_of(scores.by_variant[variant]) for variant in variants]

    if diversities is not None:
        across = [float(np.nanmean(diversities.distance[variant])) for variant in variants]
        pairs = [("diversity", across, scores.reward, means(scores)) for scores in table]
    else:
        pairs = [(table[0].reward, means(table[0]), other.reward, means(other)) for other in table[1:]]
    found = []
    for x, xs, y, ys in pairs:
        points = np.array([xs, ys]).T
        known = np.isfinite(points).all(1)
        front = np.zeros(len(points), dtype=bool)
        if known.any():
            front[known] = pareto_front(points[known])
        rows = [
            {"model": v.name, "base_name": v.model, "x": float(a), "y": float(b), "front": bool(on)}
            for v, (a, b), on, ok in zip(variants, points, front, known, strict=True)
            if ok
        ]
        found.append({"x": x, "y": y, "points": rows})
    return found


def _guidance(table: Sequence[Scores]) -> list[dict[str, Any]]:
    """Mean score of each model at each guidance, for those that were drawn at several."""
    return [
        {
            "reward": scores.reward,
            "model": model,
            "scales": [v.guidance for v in variants],
            "means": [_plain(mean_of(scores.by_variant[v])) for v in variants],
            "best": max(variants, key=lambda v: mean_of(scores.by_variant[v])).guidance,
        }
        for scores in table
        for model in scores.models
        if len(variants := sorted(scores.variants(model), key=lambda v: v.guidance)) > 1
    ]


def _run(curves: Curves) -> dict[str, Any]:
    """What a run's curves end with, and where its held-out rewards turned."""
    trained = curves.trained.get("reward") or next(iter(curves.trained.values()), [])
    return {
        "run": curves.run,
        "last": {name: points[-1][1] for name, points in curves.metrics.items()},
        "heldout": {
            name: {
                "first": points[0][1],
                "last": points[-1][1],
                "best": max(value for _, value in points),
                "turned_at": over_optimised(trained, points),
            }
            for name, points in curves.heldout.items()
        },
    }


def warnings(
    table: Sequence[Scores],
    families: Mapping[str, Sequence[Comparison]],
    rewards: Sequence[Mapping[str, str]],
    diversity: Sequence[Mapping[str, Any]],
    config: EvalConfig,
) -> list[str]:
    """What a reader of the numbers should know before believing them."""
    found = _guidance_warnings(table, config)
    roles = {reward["name"]: reward["role"] for reward in rewards}
    if "trained on" in roles.values() and "held out" not in roles.values():
        found.append("Every reward here was trained on. Add held-out ones: a reward that is trained on rises anyway.")
    by_model: dict[tuple[str, str], list[Comparison]] = {}
    for one in [*families["best"], *families["equal"]]:
        by_model.setdefault((one.model, one.setting), []).append(one)
    for (model, setting), several in by_model.items():
        up = [one.reward for one in several if roles.get(one.reward) == "trained on" and one.difference.low > 0]
        down = [one.reward for one in several if roles.get(one.reward) == "held out" and one.difference.high < 0]
        if up and down:
            found.append(
                f"{model} ({setting}): {', '.join(up)}, trained on, rose, while {', '.join(down)}, held out, fell. "
                "That is what over-optimisation looks like."
            )
    for row in diversity:
        if row["vendi_ratio"] < _VENDI_ALARM:
            share = 1 - row["vendi_ratio"]
            found.append(f"{row['model']} has lost {share:.0%} of the Vendi score of {row['against']}.")
    left_out = sum(one.left_out for one in families["equal"])
    if left_out:
        found.append(f"{left_out} pairs of images lack a score and are left out of the comparisons.")
    prompts = len(np.unique(table[0].prompts))
    if prompts < 200:
        found.append(f"{prompts} prompts: with fewer than about 200, win rates below 0.6 are hardly told from 0.5.")
    return found


def _guidance_warnings(table: Sequence[Scores], config: EvalConfig) -> list[str]:
    models = table[0].models
    swept = [model for model in models if len(table[0].variants(model)) > 1]
    if not swept:
        if len(models) < 2:
            return []
        return [
            "Every model was drawn at one guidance scale only. The best one differs between models, and a model can "
            "beat another at one scale and lose at its best: add --guidance_scales 1 2 3.5 5 7.5."
        ]
    found = []
    for scores in table:
        for model in swept:
            scales = sorted(variant.guidance for variant in scores.variants(model))
            best = max(scores.variants(model), key=lambda v: mean_of(scores.by_variant[v])).guidance
            if len(scales) > 1 and best in (scales[0], scales[-1]) and best != 1:
                where = "lowest" if best == scales[0] else "highest"
                found.append(
                    f"{scores.reward}: the best guidance of {model} is {best:g}, the {where} that was drawn. Its best "
                    "may lie beyond."
                )
    return found


def conclusions(families: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """A sentence for each comparison: of models at their best where there is a sweep, else as they were drawn."""
    return [sentence(one) for one in families["best"] or families["equal"]]


def sentence(one: Comparison) -> str:
    """Who wins, by how much, and whether that is more than chance."""
    sure = one.p_adjusted < SIGNIFICANT
    verdict = ("better" if one.win.rate > 0.5 else "worse") if sure else "not told apart"
    compared = f"{one.model} against {one.against} ({one.setting})"
    return f"{one.reward}: {verdict}: {compared}: {one.win}, p {one.p_adjusted:.2g}"
