from __future__ import annotations

import math

import pytest
import torch

from diffalign.errors import UserError
from diffalign.rewards.objectives import (
    bradley_terry_losses,
    contrastive_loss,
    pickscore_loss,
    prompt_weights,
    rao_kupper_losses,
)

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


def test_weights_of_the_card() -> None:
    expected = torch.tensor([0.285714, 0.571429, 0.142857])
    torch.testing.assert_close(prompt_weights(torch.tensor([2, 1, 4])), expected, atol=1e-6, rtol=0)


def test_rao_kupper_at_equal_scores() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    chances = torch.exp(-rao_kupper_losses(zero, zero, torch.tensor([1.0, 0.5, 0.0]), 5))
    torch.testing.assert_close(chances, torch.tensor([1, 4, 1], dtype=torch.float64) / 6)


def test_rao_kupper_outcomes_sum_to_one_and_approach_bradley_terry() -> None:
    first, second = torch.tensor([0.3, -2.0, 30.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    outcomes = [torch.full_like(first, label) for label in (1.0, 0.5, 0.0)]
    total = sum(torch.exp(-rao_kupper_losses(first, second, label, 3)) for label in outcomes)
    torch.testing.assert_close(total, torch.ones_like(first))
    nearly = rao_kupper_losses(first, second, outcomes[0], 1 + 1e-9)
    torch.testing.assert_close(nearly, bradley_terry_losses(first, second, outcomes[0]))


def test_without_a_chance_of_ties_there_is_no_rao_kupper() -> None:
    with pytest.raises(UserError, match="tie_constant must be above 1"):
        rao_kupper_losses(S0, S1, LABEL, 1.0)


@pytest.mark.parametrize("losses", [bradley_terry_losses, rao_kupper_losses])
def test_gradients_in_float64(losses: object) -> None:
    first = torch.tensor([0.4, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([0.1, 0.3, 1.9, -0.2], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1.0, 0.0, 0.5, 0.8], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: losses(a, b, label), (first, second))  # type: ignore[operator]


def test_the_same_prompt_is_no_negative() -> None:
    images = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts, scale = images.clone(), torch.tensor(10.0)
    texts[1] = texts[0]
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    both = contrastive_loss(images[[0, 2]], texts[[0, 2]], scale, torch.eye(2, dtype=torch.bool))
    three = contrastive_loss(images[[0, 0, 2]], texts, scale, same)
    # Rows 0 and 1 are one prompt and one image: each sees just what row 0 of the two sees.
    assert three < both * 1.6
    assert contrastive_loss(images[[0, 0, 2]], texts, scale, torch.eye(3, dtype=torch.bool)) > three + 0.3
