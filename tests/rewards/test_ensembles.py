"""The figures are worked out by hand (population variance); rows of the table are images."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.rewards.ensembles import MODES, Mode, combine, vote

TABLE = torch.tensor([[1, 1.2, 0.8], [2, 2.1, -1], [1.5, 1.4, 1.6]]).T
ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sum", [3, 3.1, 4.5]),
        ("lsc", [3, 3.1, 4.5]),
        ("mean", [1, 1.033333, 1.5]),
        ("median", [1, 2, 1.5]),
        ("min", [0.8, -1, 1.4]),
        ("uwo", [0.973333, -1.035556, 1.493333]),
        ("mean_std", [0.836701, -0.405030, 1.418350]),
    ],
)
def test_golden(mode: Mode, expected: list[float]) -> None:
    assert combine(TABLE, ONES, mode).tolist() == pytest.approx(expected, abs=1e-6)


def test_weights_and_uncertainty() -> None:
    weights = torch.tensor([2.0, 1, 1])
    assert combine(TABLE, weights, "sum")[0].item() == pytest.approx(4)
    assert combine(TABLE, weights, "mean")[1].item() == pytest.approx(5.1 / 4)
    assert torch.equal(combine(TABLE, ONES, "uwo", uncertainty=0), combine(TABLE, ONES, "mean"))
    doubled = combine(torch.cat([TABLE[:1], TABLE]), torch.ones(4), "mean_std")
    torch.testing.assert_close(combine(TABLE, weights, "mean_std"), doubled)


def test_votes_of_a_pair_are_the_members_that_prefer_it() -> None:
    rewards = torch.tensor([[1.0, 2], [5, 4], [3, 3]])
    assert vote(rewards, ONES, torch.zeros(2)).tolist() == [1, 1]
    assert vote(rewards, torch.tensor([1.0, 3, 1]), torch.zeros(2)).tolist() == [3, 1]
    assert vote(rewards, ONES, torch.tensor([0, 1])).tolist() == [0, 0]
    ids = torch.tensor([4, 9, 4, 9, 4])
    votes = combine(torch.tensor([[1.0, 2, 3, 4, 5], [5, 4, 3, 2, 1]]), torch.ones(2), "vote", group_ids=ids)
    assert votes.tolist() == [2, 1, 2, 1, 2]
    with pytest.raises(ValueError, match="vote needs group_ids"):
        combine(rewards, ONES, "vote")


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_score_is_a_missing_total(mode: Mode) -> None:
    rewards = TABLE.clone()
    rewards[1, 2] = math.nan
    total = combine(rewards, ONES, mode, group_ids=torch.zeros(3, dtype=torch.int64))
    assert total.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "vote"])
def test_gradients_also_where_members_agree(mode: Mode) -> None:
    table = TABLE.double().clone().requires_grad_()
    if mode != "sum":
        assert torch.autograd.gradcheck(lambda x: combine(x.double(), ONES, mode).double(), table, eps=1e-3, atol=1e-3)
    equal = torch.ones(3, 2, requires_grad=True)
    combine(equal, ONES, mode).sum().backward()
    assert equal.grad is not None and equal.grad.isfinite().all()
