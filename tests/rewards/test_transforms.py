from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.statistics import RunningStats, correlation, prompt_references
from diffalign.rewards.transforms import KINDS, LSC, PAR, Context, Transform, ZScore, apply, parse_transforms

NAN = math.nan


def run(transform: Any, *scores: float, **context: Any) -> list[float]:
    return apply(parse_transforms(transform, "x"), torch.tensor(scores), Context("r", **context)).tolist()


def test_plain_transforms() -> None:
    assert run({"kind": "affine", "scale": 100, "shift": -1}, 0.2, NAN) == pytest.approx([19, NAN], nan_ok=True)
    assert run({"kind": "clip", "low": 0, "high": 1}, -1, 0.5, 2) == [0, 0.5, 1]
    assert run({"kind": "clip", "high": 1}, -1, 2) == [-1, 1]
    assert run({"kind": "cap", "at": 7}, 5, 9) == [5, 7]
    assert run({"kind": "target", "value": 7}, 5, 9, 7) == [-2, -2, 0]
    assert run(None, 5) == [5]
    assert run([{"kind": "affine", "scale": 2}, {"kind": "cap", "at": 3}], 1, 2) == [2, 3]


def test_zscore_uses_all_it_has_seen() -> None:
    transform = ZScore()
    seen = [1.0, 2, 3, 10, 0, 5]
    run(transform, *seen[:3])
    expected = (np.array(seen[3:]) - np.mean(seen)) / np.std(seen)
    assert run(transform, *seen[3:]) == pytest.approx(expected.tolist(), abs=1e-6)
    before = transform.state_dict()
    run(transform, 100.0, update=False)
    assert transform.state_dict() == before
    assert run(ZScore(), 4, 4, 4) == [0, 0, 0]
    assert run(ZScore(), 1, NAN, 3) == pytest.approx([-1, NAN, 1], nan_ok=True)
    assert math.isnan(run(ZScore(), NAN)[0])


def test_zscore_ignores_unit_and_origin() -> None:
    scores = [1.0, 2, 5, 3]
    assert run("zscore", *scores) == pytest.approx(run("zscore", *[0.01 * s - 7 for s in scores]), abs=1e-4)


def test_frozen_statistics_keep_the_unit_of_the_model_before_training() -> None:
    transform = ZScore(freeze_after=4)
    run(transform, 0, 2)
    run(transform, 0, 2)
    assert run(transform, 11) == [10]
    assert transform.stats.count == 4
    flat = ZScore(freeze_after=2)
    with pytest.raises(UserError, match="first 2 scores of r are all 3: there is no spread"):
        run(flat, 3, 3)
    with pytest.raises(UserError, match="at least 2, got 1"):
        ZScore(freeze_after=1)


def test_processes_share_their_statistics() -> None:
    parts = [[1.0, 2.0], [7.0, 4.0, 5.0]]
    everything = [value for part in parts for value in part]
    alone = ZScore()
    run(alone, *everything)
    for part in parts:
        transform = ZScore()
        run(transform, *part, gather=lambda values: everything)
        assert transform.state_dict() == alone.state_dict()
    merged = RunningStats()
    for part in parts:
        other = RunningStats()
        other.update(part)
        merged.merge(other)
    assert merged.std == pytest.approx(np.std(everything)) and merged.mean == pytest.approx(np.mean(everything))


def test_statistics_resume_exactly() -> None:
    draw = np.random.default_rng(0).normal(1e6, 1, size=300)
    whole, first, second = RunningStats(), RunningStats(), RunningStats()
    for start in range(0, 300, 7):
        whole.update(draw[start : start + 7])
    for start in range(0, 140, 7):
        first.update(draw[start : start + 7])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for start in range(140, 300, 7):
        second.update(draw[start : start + 7])
    assert second == whole
    assert whole.std == pytest.approx(draw.std(), rel=1e-9)


def test_log_sigmoid_centred_changes_who_is_best() -> None:
    """combining.md, section 2: two rewards of three images, references 0.3 and 0."""
    rewards = torch.tensor([[1, -0.5], [0.2, 0.4], [3, -2]])
    parts = [LSC(reference=ref)(rewards[:, k], Context("r")) for k, ref in enumerate((0.3, 0.0))]
    total = parts[0] + parts[1]
    assert total.tolist() == pytest.approx([-1.377263, -1.257412, -2.191972], abs=1e-6)
    assert rewards.sum(1).tolist() == pytest.approx([0.5, 0.6, 1.0])
    assert total.argmax() == 1 and rewards.sum(1).argmax() == 2


def test_references_of_prompts() -> None:
    base = prompt_references(["a", "a", "b", "a", "b"], [1, 2, 5, 3, NAN])
    assert base == {"a": 2.0, "b": 5.0}
    assert prompt_references(["a"] * 5, [1, 2, 3, 4, 5], quantile=0.75) == {"a": 4.0}
    metadata = [{"r_ref": {"r": base[prompt]}} for prompt in ("a", "b")]
    expected = [math.log(1 / (1 + math.exp(-1))), math.log(1 / (1 + math.exp(1)))]
    assert run({"kind": "lsc", "reference": "prompt"}, 3, 4, metadata=metadata) == pytest.approx(expected)
    with pytest.raises(UserError, match=r"image 1 has no reference for r: its metadata needs r_ref: \{r: number\}"):
        run({"kind": "lsc", "reference": "prompt"}, 3, 4, metadata=[metadata[0], {}])
    assert run({"kind": "par", "reference": "prompt", "fallback": 4}, 4, metadata=[{}]) == [0.5]
    running = LSC()
    run(running, 1, 3)
    assert run(running, 2, update=False) == pytest.approx([math.log(0.5)])
    assert run({"kind": "par", "reference": 0.2, "temperature": 0.01}, 0.21) == pytest.approx([1 / (1 + math.exp(-1))])


@pytest.mark.parametrize(
    "transform",
    [
        KINDS["affine"](scale=3),
        KINDS["target"](value=9.0),
        LSC(reference=0.3),
        PAR(reference=0.3),
        ZScore(freeze_after=2),
    ],
)
def test_gradients(transform: Transform) -> None:
    if isinstance(transform, ZScore):
        transform.stats.update([0.0, 1.0, 4.0])

    def function(scores: Tensor) -> Tensor:
        return transform(scores, Context("r")).double()

    scores = torch.tensor([0.1, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    if isinstance(transform, ZScore):  # returns float32
        function(scores).sum().backward()
        assert scores.grad is not None
        assert scores.grad.tolist() == pytest.approx([1 / transform.stats.std] * 3)
    else:
        assert torch.autograd.gradcheck(function, scores)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ("zscor", "x: there is no transform 'zscor'. Did you mean 'zscore'?"),
        ({"kind": "cap", "att": 3}, "unknown key 'att'. Did you mean 'at'?"),
        ({"at": 3}, "no transform None"),
        ("cap", "'at' has no value"),
        ("clip", "needs low, high or both"),
        ({"kind": "clip", "low": 2, "high": 1}, "low 2.0 above high 1.0"),
        ({"kind": "lsc", "reference": "promt"}, "promt"),
        ({"kind": "lsc", "temperature": 0}, "must be above 0"),
        ([3], "a transform is a name or a mapping with kind, got 3"),
    ],
)
def test_wrong_transforms(transform: Any, message: str) -> None:
    with pytest.raises(UserError) as info:
        parse_transforms(transform, "x")
    assert message in str(info.value)


def test_correlations() -> None:
    a, b = [1.0, 2, 3, 4, NAN], [1.0, 4, 9, 100, 5]
    result = correlation(a, b)
    assert result["spearman"] == pytest.approx(1) and result["count"] == 4
    assert result["pearson"] == pytest.approx(np.corrcoef(a[:4], b[:4])[0, 1])
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3])["pearson"])
    assert math.isnan(correlation([1, 2], [1, 2])["spearman"])
