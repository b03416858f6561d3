"""MaPO's objective: golden values, accuracy near zero, bounds, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.trainers.mapo import MaPOConfig, mapo_logit, mapo_loss, mapo_score


def at(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_golden_values() -> None:
    m_w, m_l = at(0.025), at(0.05)
    assert mapo_score(m_w).item() == pytest.approx(0.9937630207994251, abs=1e-15)
    assert mapo_score(m_l).item() == pytest.approx(0.9875520827908068, abs=1e-15)
    z = mapo_logit(m_w, m_l)
    assert z.item() == pytest.approx(6.210938008618383, abs=1e-11)
    assert -0.1 * torch.nn.functional.logsigmoid(z).item() == pytest.approx(0.00020053416234275278, abs=1e-15)
    assert mapo_loss(m_w, m_l).item() == pytest.approx(0.025200534162342757, abs=1e-15)


def test_temperature_and_weight_are_two_settings() -> None:
    m_w, m_l = at(0.025), at(0.03)
    assert mapo_logit(m_w, m_l, temperature=10.0).item() == pytest.approx(mapo_logit(m_w, m_l).item() / 100)
    margin = mapo_loss(m_w, m_l) - m_w
    torch.testing.assert_close(mapo_loss(m_w, m_l, beta=0.001) - m_w, margin / 100)


def test_scores_are_exact_in_float32_from_no_error_on() -> None:
    exact = torch.cat([at(0.0), torch.logspace(-12, 2, 400, dtype=torch.float64)])
    expected = torch.where(exact == 0, torch.ones_like(exact), 0.5 * exact / torch.expm1(0.5 * exact))
    torch.testing.assert_close(mapo_score(exact), expected, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(mapo_score(exact.float()).double(), expected, atol=2e-7, rtol=1e-5)


def test_slopes_are_exact_in_float32_from_no_error_on() -> None:
    errors = torch.cat([at(0.0), torch.logspace(-9, 1, 200, dtype=torch.float64)])
    slopes = []
    for dtype in (torch.float64, torch.float32):
        m = errors.to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(mapo_score(m).sum(), m)
        slopes.append(slope.double())
    torch.testing.assert_close(slopes[1], slopes[0], atol=5e-5, rtol=0)
    assert slopes[0][0].item() == -0.25  # phi' = -s/2
    assert bool((slopes[0] < 0).all()) and bool((slopes[0].diff() >= -1e-12).all()), "the push fades, never turns"


def test_for_small_errors_it_is_a_dpo_without_a_reference() -> None:
    m_w, m_l = at(1e-4), at(2e-4)
    assert mapo_logit(m_w, m_l).item() == pytest.approx(250 * 1e-4, rel=1e-3)


def test_a_very_bad_rejected_image_stops_pushing() -> None:
    m_l = at(60.0).requires_grad_()
    mapo_loss(at(0.02), m_l).backward()
    assert m_l.grad is not None and abs(m_l.grad.item()) < 1e-10


def test_gradients_by_finite_differences_and_their_signs() -> None:
    m_w = torch.tensor([0.0205, 0.03, 0.3], dtype=torch.float64, requires_grad=True)
    m_l = torch.tensor([0.0206, 0.029, 0.31], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, x: mapo_loss(w, x, temperature=50.0), (m_w, m_l))
    g_w, g_l = torch.autograd.grad(mapo_loss(m_w, m_l).sum(), (m_w, m_l))
    assert bool((g_w > 1).all()), "the denoising loss, and the margin on top"
    assert bool((g_l < 0).all())


def test_equal_errors_cost_the_denoising_loss_and_ln_2_of_the_margin() -> None:
    assert mapo_loss(at(0.1), at(0.1)).item() == pytest.approx(0.1 + 0.1 * math.log(2), abs=1e-15)


@pytest.mark.parametrize("name", ["beta_mapo", "snr_value", "mapo_temperature"])
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    setting: dict[str, Any] = {name: 0.0}
    with pytest.raises(UserError, match=f"{name} must be above 0"):
        MaPOConfig(pretrained_model_name_or_path="m", output_dir="o", dataset_name="d", **setting)
