"""The core of losses on pairs: both orders of a pair, shared metrics, the SDPO safeguard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.error import per_sample_mse
from diffalign.errors import UserError
from diffalign.training.pair_loss import (
    PairErrors,
    PairLossConfig,
    both_orders,
    safeguard_scale,
    share_above_zero,
)


def pairs(label: list[float] | None = None, n: int = 3) -> PairErrors:
    draw = torch.Generator().manual_seed(0)
    policy, reference, target = (torch.randn(2 * n, 2, 3, 3, generator=draw).double() for _ in range(3))
    (m_w, m_l), (r_w, r_l) = (per_sample_mse(pred, target).chunk(2) for pred in (policy, reference))
    return PairErrors(m_w, m_l, r_w, r_l, torch.tensor(label or [1.0] * n), policy, reference, target)


def test_swapping_twice_gives_the_pairs_back_and_once_the_errors_of_the_other_order() -> None:
    errors = pairs([1.0, 0.7, 0.5])
    swapped = errors.swapped()
    m = per_sample_mse(swapped.policy, swapped.target)
    r = per_sample_mse(torch.as_tensor(swapped.reference), swapped.target)
    assert swapped.r_w is not None
    torch.testing.assert_close(torch.cat([swapped.m_w, swapped.m_l]), m)
    torch.testing.assert_close(swapped.r_w, r.chunk(2)[0])
    torch.testing.assert_close(swapped.label, torch.tensor([0.0, 0.3, 0.5]))
    twice = swapped.swapped()
    assert torch.equal(twice.policy, errors.policy) and torch.equal(twice.m_w, errors.m_w)


def test_a_loss_is_weighed_by_the_label_over_both_orders() -> None:
    errors = pairs([1.0, 0.7, 0.5])

    def loss(e: PairErrors) -> Tensor:
        return e.m_w - 0.1 * e.m_l

    there, back = loss(errors), loss(errors.swapped())
    p = errors.label.double()
    torch.testing.assert_close(both_orders(loss, errors), p * there + (1 - p) * back)
    certain = pairs()
    assert torch.equal(both_orders(loss, certain), loss(certain))


def test_metrics_compare_with_the_reference_where_there_is_one() -> None:
    errors = pairs()
    report = errors.metrics()
    better = torch.tensor([float(d > 0) for d in (errors.r_w - errors.m_w) - (errors.r_l - errors.m_l)])  # type: ignore[operator]
    assert report["implicit_accuracy"].item() == pytest.approx(better.mean().item())
    alone = replace(errors, r_w=None, r_l=None, reference=None).metrics()
    assert set(alone) == {"pair_accuracy", "chosen_error", "rejected_error"}
    assert alone["pair_accuracy"].item() == pytest.approx((errors.m_l > errors.m_w).float().mean().item())


def test_nothing_won_counts_as_half() -> None:
    assert share_above_zero(torch.tensor([1.0, 0.0, -1.0, 0.0])).item() == 0.5


W, L = torch.tensor([[0.1, 0.2]]).double(), torch.tensor([[0.3, 0.1]]).double()


@pytest.mark.parametrize(("mu", "expected"), [(0.5, 0.5), (0.2, 0.8), (0.0, 1.0), (1.0, 0.0)])
def test_golden_scale_of_the_safeguard(mu: float, expected: float) -> None:
    assert safeguard_scale(W, L, mu).item() == pytest.approx(expected, abs=1e-6)


def test_orthogonal_and_opposed_residuals_are_left_alone() -> None:
    orthogonal = torch.tensor([[0.2, -0.1]]).double()
    assert safeguard_scale(W, orthogonal, 0.9).item() == 1.0
    assert safeguard_scale(W, -W, 0.9).item() == 1.0


def test_one_scale_a_pair_does_not_depend_on_the_batch_and_one_a_batch_does() -> None:
    w, losing = torch.cat([W, W]), torch.cat([L, -L])
    torch.testing.assert_close(
        safeguard_scale(w, losing, 0.5, per_pair=True), torch.tensor([0.5, 1.0]).double(), atol=1e-6, rtol=0
    )
    assert safeguard_scale(w, losing, 0.5).item() == 1.0  # The inner products cancel.


def test_to_first_order_the_safeguard_keeps_the_chosen_error_from_rising() -> None:
    """A step along minus (g_w - lambda g_l), shared by both predictions, changes m_w by -<g_w, g_w - lambda g_l>."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        g_w, g_l = torch.randn(2, 1, 8, generator=draw).double()
        g_l = g_l * 5 + g_w
        scale = safeguard_scale(g_w, g_l, mu=0.3)
        assert (g_w * (g_w - scale * g_l)).sum() >= 0.3 * g_w.square().sum() - 1e-6


def settings(**overrides: Any) -> PairLossConfig:
    return PairLossConfig(pretrained_model_name_or_path="m", output_dir="o", dataset_name="d", **overrides)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"safeguard_mu": 1.1}, "safeguard_mu must be in"),
        ({"safeguard": "sdpo", "ties": "keep"}, "a tie has none"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**setting)
