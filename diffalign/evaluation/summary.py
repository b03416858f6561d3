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
    Axis,
    Comparison,
    Scores,
    Variant,
    at_equal_settings,
    at_their_best,
    by_category,
    corrected,
    mean_of,
    per_prompt,
    rival,
)
from diffalign.evaluation.curves import Curves, over_optimised, smoothed
from diffalign.evaluation.eval_config import EvalConfig
from diffalign.evaluation.pareto import pareto_front
from diffalign.evaluation.sampling import versions
from diffalign.evaluation.stats import paired_difference

Floats = NDArray[np.float64]
SIGNIFICANT = 0.05
CLIP_DISTANCE, VENDI, LPIPS = "distance", "vendi", "lpips"
AXES: tuple[Axis, ...] = ("guidance", "steps", "scale", "trained")
_VENDI_ALARM = 0.8
"""Share of the baseline's Vendi score below which the report warns."""


@dataclass(frozen=True)
class Diversities:
    """How different the images of each prompt are.

    Attributes:
        prompts: indices (p,).
        values: by measure, (p,) of each variant: "distance" is the mean pairwise 1 - cosine of the prompt's images by
            CLIP, "vendi" their effective number, "lpips" their mean pairwise LPIPS.
    """

    prompts: Sequence[int]
    values: Mapping[str, Mapping[Variant, Floats]]

    def mean(self, measure: str, variant: Variant) -> float:
        """Over the prompts."""
        return float(np.nanmean(self.values[measure][variant]))

    @property
    def pairwise(self) -> list[str]:
        """The measures that are distances."""
        return [name for name in (CLIP_DISTANCE, LPIPS) if name in self.values]


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
        "fronts": _fronts(table, diversities, distances),
        "runs": [_run(one) for one in curves],
        "sweeps": {axis: _sweep(table, axis) for axis in AXES},
        "reference": {"images": config.reference_images, "features": config.reference_features} if distances else None,
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
        found |= {measure: diversities.mean(measure, variant) for measure in diversities.values}
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
    """Of each variant against the baseline's at the same settings: the change over prompts of each distance."""
    if diversities is None:
        return []
    variants = list(next(iter(diversities.values.values())))
    own = [variant for variant in variants if variant.model == baseline]
    rows = []
    for variant in variants:
        other = None if variant.model == baseline else rival(variant, own)
        if other is None:
            continue
        row: dict[str, Any] = {"model": variant.name, "against": other.name, "changes": {}}
        for measure in diversities.pairwise:
            ours, theirs = (diversities.values[measure][v] for v in (variant, other))
            both = np.isfinite(ours) & np.isfinite(theirs)
            row["changes"][measure] = _plain_difference(paired_difference(ours[both], theirs[both], draws=draws))
        if VENDI in diversities.values:
            row["vendi_ratio"] = diversities.mean(VENDI, variant) / diversities.mean(VENDI, other)
        rows.append(row)
    return rows


def _plain_difference(change: Any) -> dict[str, Any]:
    return {key: _plain(value) for key, value in dataclasses.asdict(change).items()}


def _fronts(
    table: Sequence[Scores],
    diversities: Diversities | None,
    distances: Mapping[Variant, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Which variants nothing beats in two things at once: each reward, diversity and realism with one another.

    Where neither diversity nor realism was measured, the first reward with each of the others.
    """
    variants = list(table[0].by_variant)
    rewards = {scores.reward: [mean_of(scores.by_variant[v]) for v in variants] for scores in table}
    prices: dict[str, list[float]] = {}
    if diversities is not None:
        measure = diversities.pairwise[0]
        prices["diversity"] = [diversities.mean(measure, v) for v in variants]
    if distances:
        prices["realism (-KID)"] = [-distances[v]["kid"] for v in variants]
    if prices:
        pairs = [(x, y) for x in prices for y in rewards] + ([tuple(prices)] if len(prices) > 1 else [])
    else:
        first, *others = rewards
        pairs = [(first, other) for other in others]
    axes = {**rewards, **prices}
    return [_front(table[0], x, y, np.array([axes[x], axes[y]]).T) for x, y in pairs]


def _front(scores: Scores, x: str, y: str, points: Floats) -> dict[str, Any]:
    variants = list(scores.by_variant)
    known = np.isfinite(points[:, 0]) & np.isfinite(points[:, 1])
    front = np.zeros(len(points), dtype=np.bool_)
    if known.any():
        front[known] = pareto_front(points[known])
    rows = [
        {
            "model": v.name,
            "line": _line(v, scores),
            "at": _at(v, variants),
            "x": float(a),
            "y": float(b),
            "front": bool(on),
        }
        for v, (a, b), on, ok in zip(variants, points, front, known, strict=True)
        if ok
    ]
    return {"x": x, "y": y, "points": rows}


def _line(variant: Variant, scores: Scores) -> str:
    """What joins points: over the scale of a LoRA, else over guidance, else over steps."""
    return scores.shared(variant, "scale" if variant.scale is not None else "guidance" if scores.guided else "steps")


def _at(variant: Variant, variants: Sequence[Variant]) -> str:
    """What tells a variant from others of its line, in few letters."""
    several = [
        axis for axis in ("scale", "guidance", "steps") if len({getattr(v, axis) for v in variants} - {None}) > 1
    ]
    values = [getattr(variant, axis) for axis in several]
    return ", ".join(f"{value:g}" for value in values if value is not None)


def _sweep(table: Sequence[Scores], axis: Axis) -> list[dict[str, Any]]:
    """Mean scores over one setting, of what was drawn at several of it."""
    return [
        {
            "reward": scores.reward,
            "model": line,
            "at": [getattr(v, axis) for v in variants],
            "means": [_plain(mean_of(scores.by_variant[v])) for v in variants],
            "best": getattr(max(variants, key=lambda v: mean_of(scores.by_variant[v])), axis),
        }
        for scores in table
        for line, variants in scores.series(axis).items()
        if len(variants) > 1
    ]


def _run(curves: Curves) -> dict[str, Any]:
    """What a run's curves begin and end with, and where its held-out rewards turned."""
    trained = curves.trained.get("reward") or next(iter(curves.trained.values()), [])
    return {
        "run": curves.run,
        "steps": max((step for points in curves.metrics.values() for step, _ in points), default=0),
        "shown": {
            name: {"first": points[0][1], "last": smoothed(points)[-1][1]} for name, points in curves.shown.items()
        },
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
    roles = {reward["name"]: reward["role"] for reward in rewards}
    found = _guidance_warnings(table) + _turns(table, roles)
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
        if row.get("vendi_ratio", 1.0) < _VENDI_ALARM:
            share = 1 - row["vendi_ratio"]
            found.append(f"{row['model']} has lost {share:.0%} of the Vendi score of {row['against']}.")
    left_out = sum(one.left_out for one in families["equal"])
    if left_out:
        found.append(f"{left_out} pairs of images lack a score and are left out of the comparisons.")
    prompts = len(np.unique(table[0].prompts))
    if prompts < 200:
        found.append(f"{prompts} prompts: with fewer than about 200, win rates below 0.6 are hardly told from 0.5.")
    return found


def _turns(table: Sequence[Scores], roles: Mapping[str, str]) -> list[str]:
    """Where a held-out reward falls from one checkpoint of a run to the next while a trained-on one still rises."""
    curves = {
        (scores.reward, line): [(float(v.trained or 0), mean_of(scores.by_variant[v])) for v in variants]
        for scores in table
        for line, variants in scores.series("trained").items()
    }
    found = []
    for (reward, line), points in curves.items():
        for (other, same), trained in curves.items():
            if roles.get(reward) != "held out" or roles.get(other) != "trained on" or same != line:
                continue
            step = over_optimised(trained, points)
            if step is not None:
                found.append(
                    f"{line}: {reward}, held out, falls after step {step:g} while {other}, trained on, rises. Look at "
                    "that checkpoint before you take the last one."
                )
    return found


def _guidance_warnings(table: Sequence[Scores]) -> list[str]:
    lines = table[0].series("guidance")
    if all(len(variants) < 2 for variants in lines.values()):
        if len(table[0].models) < 2:
            return []
        return [
            "Every model was drawn at one guidance scale only. The best one differs between models, and a model can "
            "beat another at one scale and lose at its best: add --guidance_scales 1 2 3.5 5 7.5."
        ]
    edges: dict[tuple[float, str], dict[str, list[str]]] = {}
    for scores in table:
        for line, variants in lines.items():
            best = max(variants, key=lambda v: mean_of(scores.by_variant[v])).guidance
            if len(variants) > 1 and best in (variants[0].guidance, variants[-1].guidance) and best != 1:
                where = "lowest" if best == variants[0].guidance else "highest"
                edges.setdefault((best, where), {}).setdefault(line, []).append(scores.reward)
    return [
        f"The best guidance is {best:g}, the {where} that was drawn, and may lie beyond: "
        + "; ".join(f"of {line} by {', '.join(rewards)}" for line, rewards in of.items())
        + "."
        for (best, where), of in edges.items()
    ]


def conclusions(families: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """A sentence for each comparison: of models at their best where there is a sweep, else as they were drawn."""
    return [sentence(one) for one in families["best"] or families["equal"]]


def sentence(one: Comparison) -> str:
    """Who wins, by how much, and whether that is more than chance."""
    sure = one.p_adjusted < SIGNIFICANT
    verdict = ("better" if one.win.rate > 0.5 else "worse") if sure else "not told apart"
    compared = f"{one.model} against {one.against} ({one.setting})"
    return f"{one.reward}: {verdict}: {compared}: {one.win}, p {one.p_adjusted:.2g}"
