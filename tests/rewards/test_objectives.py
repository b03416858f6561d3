from __future__ import annotations

import math

import pytest
import torch

from diffalign.rewards.objectives import pickscore_loss

S0, S1 = torch.tensor([21.5, 20.0, 22.0]), torch.tensor([21.0, 21.0, 21.8])
LABEL = torch.tensor([1.0, 0.0, 0.5])


@pytest.mark.parametrize(("row", "expected"), [(0, 0.474077), (1, 0.313262), (2, 0.004992)])
def test_each_example(row: int, expected: float) -> None:
    part = slice(row, row + 1)
    assert pickscore_loss(S0[part], S1[part], LABEL[part]).item() == pytest.approx(expected, abs=1e-6)


def test_examples_are_weighted_by_how_many_share_their_prompt() -> None:
    assert pickscore_loss(S0, S1, LABEL, torch.tensor([2, 1, 4])).item() == pytest.approx(0.315170, abs=1e-6)
    assert pickscore_loss(S0, S1, LABEL).item() == pytest.approx(0.264110, abs=1e-6)


def test_a_perfect_tie_costs_nothing_and_a_wrong_choice_is_never_infinite() -> None:
    zero = torch.zeros(1)
    assert pickscore_loss(zero, zero, torch.tensor([0.5])).item() == pytest.approx(0, abs=1e-7)
    assert pickscore_loss(zero, zero, torch.tensor([1.0])).item() == pytest.approx(math.log(2))
    assert pickscore_loss(zero, zero + 500, torch.tensor([1.0])).item() == pytest.approx(500)


def test_gradients_raise_the_preferred_score() -> None:
    scores = S0.clone().requires_grad_()
    pickscore_loss(scores, S1, LABEL).backward()
    assert scores.grad is not None and torch.isfinite(scores.grad).all()
    assert scores.grad[0] < 0 < scores.grad[1]


def test_half_precision_scores_are_compared_in_float32() -> None:
    assert pickscore_loss(S0.half(), S1.half(), LABEL).dtype == torch.float32
