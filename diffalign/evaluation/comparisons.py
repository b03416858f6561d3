"""Models against one another by the scores of their images: at one guidance, each at its best, by category.

A model drawn at several guidance scales is several variants. Which guidance is best for a model is chosen by scores,
and a choice made on the images that are then compared flatters whoever had more to choose from. So the prompts are
halved: each half is compared at the guidance that is best on the other half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.multiple import Correction, adjusted
from diffalign.evaluation.stats import PairedDifference, WinRate, paired_difference, win_rate

Floats = NDArray[np.float64]
Axis = Literal["guidance", "steps", "scale", "trained"]
_FEWEST = 5
"""Prompts that a category needs to be compared by itself."""


@dataclass(frozen=True)
class Variant:
    """A model as it was drawn: its name, which all its settings share, and what differs between them.

    Attributes:
        family, scale: of a sweep over the scale of LoRAs, the name without the scale, and the scale.
        run, trained: of a checkpoint, the run, and the training step.
    """

    model: str
    guidance: float
    steps: int
    family: str = ""
    scale: float | None = None
    run: str = ""
    trained: int | None = None

    @property
    def name(self) -> str:
        """Short and unlike that of any other variant."""
        return f"{self.model} (guidance {self.guidance:g}, {self.steps} steps)"


@dataclass(frozen=True)
class Comparison:
    """One model against another by one reward.

    Attributes:
        reward, model, against: names.
        setting: at which settings, in words.
        win: of the model, paired by prompt and seed.
        median_win: of the medians over each prompt's images; None where each prompt has one.
        difference: mean difference of the scores.
        p_adjusted: the sign test's p value, adjusted for its family.
        left_out: pairs of images without a score.
        category: of the prompts; "" for all.
    """

    reward: str
    model: str
    against: str
    setting: str
    win: WinRate
    median_win: WinRate | None
    difference: PairedDifference
    p_adjusted: float
    left_out: int
    category: str = ""


@dataclass(frozen=True)
class Scores:
    """Scores of one reward: of each variant, (n,), NaN where there is none, in the order of the prompts.

    ``prompts`` is the prompt of each image and ``categories`` its category ("" for none), both (n,).
    """

    reward: str
    by_variant: Mapping[Variant, Floats]
    prompts: NDArray[np.int64]
    categories: Sequence[str]

    @property
    def models(self) -> list[str]:
        """Names, in order."""
        return list(dict.fromkeys(variant.model for variant in self.by_variant))

    def variants(self, model: str) -> list[Variant]:
        """Of one model."""
        return [variant for variant in self.by_variant if variant.model == model]

    @property
    def stepped(self) -> bool:
        """Whether the variants differ in their numbers of steps."""
        return len({variant.steps for variant in self.by_variant}) > 1

    @property
    def guided(self) -> bool:
        """Whether the variants differ in guidance."""
        return len({variant.guidance for variant in self.by_variant}) > 1

    def shared(self, variant: Variant, axis: Axis) -> str:
        """A name of what a variant shares with others of its model that differ in this setting only."""
        parts = [{"scale": variant.family, "trained": variant.run}.get(axis, variant.model)]
        parts += [f"scale {variant.scale:g}"] if variant.scale is not None and axis == "trained" else []
        parts += [f"guidance {variant.guidance:g}"] if self.guided and axis != "guidance" else []
        parts += [_steps(variant.steps)] if self.stepped and axis != "steps" else []
        return ", ".join(parts)

    def series(self, axis: Axis) -> dict[str, list[Variant]]:
        """Variants that differ in one setting only, sorted by it, by a name of what they share."""
        found: dict[str, list[Variant]] = {}
        for variant in self.by_variant:
            if getattr(variant, axis) is not None:
                found.setdefault(self.shared(variant, axis), []).append(variant)
        return {name: sorted(several, key=lambda v: getattr(v, axis)) for name, several in found.items()}

    def prompt_means(self, variant: Variant) -> Floats:
        """Mean score of each prompt's images, of the prompts that have one."""
        values = self.by_variant[variant]
        known = np.isfinite(values)
        groups = np.unique(self.prompts[known], return_inverse=True)[1]
        return np.bincount(groups, weights=values[known]) / np.bincount(groups)


def compare(
    scores: Scores,
    a: Floats,
    b: Floats,
    *,
    model: str,
    against: str,
    setting: str,
    category: str = "",
    draws: int = 10_000,
) -> Comparison | None:
    """Compare scores (n,) of one model with those of another; pairs that lack one are left out. None without any."""
    both = np.isfinite(a) & np.isfinite(b)
    if category:
        within = np.array([c == category for c in scores.categories])
        a, b, prompts, both = a[within], b[within], scores.prompts[within], both[within]
    else:
        prompts = scores.prompts
    if not both.any():
        return None
    groups = prompts[both].tolist()
    win = win_rate(a[both], b[both], groups=groups, draws=draws)
    several = len(set(groups)) < len(groups)
    medians = win_rate(per_prompt(a[both], groups), per_prompt(b[both], groups)) if several else None
    difference = paired_difference(a[both], b[both], groups=groups, draws=draws)
    left_out = int((~both).sum())
    return Comparison(
        scores.reward, model, against, setting, win, medians, difference, win.p_value, left_out, category
    )


def rival(variant: Variant, others: Sequence[Variant]) -> Variant | None:
    """Which of a model's variants another model's is compared with; None where that is not clear.

    The one of the same guidance and steps; else the only one of the same steps, of the same guidance, or at all.
    """
    for same in (("guidance", "steps"), ("steps",), ("guidance",), ()):
        found = [other for other in others if all(getattr(other, key) == getattr(variant, key) for key in same)]
        if len(found) == 1:
            return found[0]
    return None


def rivals(variants: Sequence[Variant]) -> list[int]:
    """Side by side: the place of the one that each is compared with.

    Of the first model at the same settings; the first of all where there is none, and for the first model's own.
    """
    own = [variant for variant in variants if variant.model == variants[0].model]
    found = [variants[0] if v in own else rival(v, own) or variants[0] for v in variants]
    return [list(variants).index(variant) for variant in found]


def column_names(variants: Sequence[Variant]) -> list[str]:
    """Short names side by side: only what differs among the variants, the model's name where there are several."""
    several = len({v.model for v in variants}) > 1
    guided, stepped = len({v.guidance for v in variants}) > 1, len({v.steps for v in variants}) > 1
    names = []
    for v in variants:
        parts = [v.model] if several or not (guided or stepped) else []
        parts += [f"guidance {v.guidance:g}"] if guided else []
        parts += [_steps(v.steps)] if stepped else []
        names.append(", ".join(parts))
    return names


def at_equal_settings(scores: Scores, baseline: str, draws: int = 10_000) -> list[Comparison]:
    """Every variant against the baseline's :func:`rival`."""
    own = scores.variants(baseline)
    found: list[Comparison | None] = []
    for variant, values in scores.by_variant.items():
        other = None if variant.model == baseline else rival(variant, own)
        if other is not None:
            text = _setting(f"{variant.guidance:g}", f"{other.guidance:g}", variant.steps, other.steps, scores.stepped)
            against = scores.by_variant[other]
            found.append(
                compare(scores, values, against, model=variant.model, against=baseline, setting=text, draws=draws)
            )
    return [comparison for comparison in found if comparison is not None]


def at_their_best(scores: Scores, baseline: str, draws: int = 10_000) -> list[Comparison]:
    """Every model at its best guidance against the baseline at its best; empty where none has several.

    Numbers of steps are compared each: few are cheaper, and never better by themselves.
    """
    if all(len(line) < 2 for model in scores.models for line in _lines(scores, model).values()):
        return []
    return _cross_compared(scores, baseline, [""], draws)


def by_category(scores: Scores, baseline: str, draws: int = 10_000) -> list[Comparison]:
    """Per category, models at their best where they have several settings, and as they are where not."""
    pairs = set(zip(scores.categories, scores.prompts.tolist(), strict=True))
    categories = [
        c for c in dict.fromkeys(scores.categories) if c and sum(c == other for other, _ in pairs) >= _FEWEST
    ]
    return _cross_compared(scores, baseline, categories, draws)


def cross_fitted(scores: Scores, variants: Sequence[Variant]) -> tuple[Floats, str]:
    """Scores (n,) of a model, each half of the prompts at the variant that is best on the other; and their guidance.

    Prompts are halved by turns in their order, so that both halves hold all categories.
    """
    ranks = np.unique(scores.prompts, return_inverse=True)[1]
    result = np.full(len(ranks), math.nan)
    chosen = []
    for half in (0, 1):
        here, there = ranks % 2 == half, ranks % 2 != half
        best = max(variants, key=lambda variant: mean_of(scores.by_variant[variant][there]))
        result[here] = scores.by_variant[best][here]
        chosen.append(best.guidance)
    return result, " and ".join(f"{guidance:g}" for guidance in dict.fromkeys(chosen))


def _lines(scores: Scores, model: str) -> dict[int, list[Variant]]:
    """The variants of a model by their number of steps."""
    found: dict[int, list[Variant]] = {}
    for variant in scores.variants(model):
        found.setdefault(variant.steps, []).append(variant)
    return found


def _cross_compared(scores: Scores, baseline: str, categories: Sequence[str], draws: int) -> list[Comparison]:
    """Every model at each number of steps against the baseline at the same, or else at its most."""
    own = {steps: cross_fitted(scores, line) for steps, line in _lines(scores, baseline).items()}
    found = []
    for model in scores.models:
        for steps, line in _lines(scores, model).items() if model != baseline else ():
            other = steps if steps in own else max(own)
            (a, at), (b, theirs) = cross_fitted(scores, line), own[other]
            found += [
                compare(
                    scores,
                    a,
                    b,
                    model=model,
                    against=baseline,
                    setting=_setting(at, theirs, steps, other, scores.stepped),
                    category=category,
                    draws=draws,
                )
                for category in categories
            ]
    return [comparison for comparison in found if comparison is not None]


def _setting(guidance: str, other: str, steps: int, others: int, stepped: bool) -> str:
    """What a comparison was made at: "guidance 5", "guidance 1 against 5, 4 steps against 30"."""
    text = f"guidance {guidance}" if guidance == other else f"guidance {guidance} against {other}"
    if steps != others:
        return f"{text}, {_steps(steps)} against {others}"
    return f"{text}, {_steps(steps)}" if stepped else text


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def corrected(family: Sequence[Comparison], correction: Correction) -> list[Comparison]:
    """The comparisons with p values adjusted for all of them."""
    values = adjusted([comparison.win.p_value for comparison in family], correction)
    return [replace(one, p_adjusted=float(value)) for one, value in zip(family, values, strict=True)]


def per_prompt(values: Floats, prompts: Sequence[int]) -> Floats:
    """Median of each prompt's values, in order of first appearance."""
    by_prompt: dict[int, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        by_prompt.setdefault(prompt, []).append(float(value))
    return np.array([np.median(group) for group in by_prompt.values()])


def mean_of(values: Floats) -> float:
    """Mean of what is finite; minus infinity where nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else -math.inf
