"""Models against one another by the scores of their images: at one guidance, each at its best, by category.

A model drawn at several guidance scales is several variants. Which guidance is best for a model is chosen by scores,
and a choice made on the images that are then compared flatters whoever had more to choose from. So the prompts are
halved: each half is compared at the guidance that is best on the other half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.multiple import Correction, adjusted
from diffalign.evaluation.stats import PairedDifference, WinRate, paired_difference, win_rate

Floats = NDArray[np.float64]
_FEWEST = 5
"""Prompts that a category needs to be compared by itself."""


@dataclass(frozen=True)
class Variant:
    """A model as it was drawn: its name, which all its settings share, and what differs between them."""

    model: str
    guidance: float
    steps: int

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


def at_equal_settings(scores: Scores, baseline: str, draws: int = 10_000) -> list[Comparison]:
    """Every variant against the baseline's of the same guidance, or else against its only one."""
    base = {variant.guidance: values for variant, values in scores.by_variant.items() if variant.model == baseline}
    only = scores.variants(baseline)
    found: list[Comparison | None] = []
    for variant, values in scores.by_variant.items():
        if variant.model == baseline:
            continue
        if variant.guidance in base:
            other, setting = base[variant.guidance], f"guidance {variant.guidance:g}"
        elif len(only) == 1:
            other = scores.by_variant[only[0]]
            setting = f"guidance {variant.guidance:g} against {only[0].guidance:g}"
        else:
            continue
        found.append(
            compare(scores, values, other, model=variant.model, against=baseline, setting=setting, draws=draws)
        )
    return [comparison for comparison in found if comparison is not None]


def at_their_best(scores: Scores, baseline: str, draws: int = 10_000) -> list[Comparison]:
    """Every model at its best guidance against the baseline at its best; empty where none has several."""
    if len(scores.by_variant) == len(scores.models):
        return []
    best = {model: cross_fitted(scores, model) for model in scores.models}
    found = [
        compare(
            scores,
            best[model][0],
            best[baseline][0],
            model=model,
            against=baseline,
            setting=f"{best[model][1]} against {best[baseline][1]}",
            draws=draws,
        )
        for model in scores.models
        if model != baseline
    ]
    return [comparison for comparison in found if comparison is not None]


def cross_fitted(scores: Scores, model: str) -> tuple[Floats, str]:
    """Scores (n,) of a model, each half of the prompts at the variant that is best on the other; and which those are.

    Prompts are halved by turns in their order, so that both halves hold all categories.
    """
    variants = scores.variants(model)
    ranks = np.unique(scores.prompts, return_inverse=True)[1]
    result = np.full(len(ranks), math.nan)
    chosen = []
    for half in (0, 1):
        here, there = ranks % 2 == half, ranks % 2 != half
        best = max(variants, key=lambda variant: mean_of(scores.by_variant[variant][there]))
        result[here] = scores.by_variant[best][here]
        chosen.append(best.guidance)
    named = " and ".join(f"{guidance:g}" for guidance in dict.fromkeys(chosen))
    return result, f"guidance {named}"


def by_category(scores: Scores, baseline: str, draws: int = 10_000) -> list[Comparison]:
    """Per category, models at their best where they have several settings, and as they are where not."""
    categories = [c for c in dict.fromkeys(scores.categories) if c]
    best = {model: cross_fitted(scores, model) for model in scores.models}
    prompts = {c: {p for p, other in zip(scores.prompts, scores.categories, strict=True) if other == c}
               for c in categories}  # fmt: skip
    found = [
        compare(
            scores,
            best[model][0],
            best[baseline][0],
            model=model,
            against=baseline,
            setting=f"{best[model][1]} against {best[baseline][1]}",
            category=category,
            draws=draws,
        )
        for model in scores.models
        if model != baseline
        for category in categories
        if len(prompts[category]) >= _FEWEST
    ]
    return [comparison for comparison in found if comparison is not None]


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
