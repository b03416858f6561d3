"""CPO, ORPO, DMPO, DSPO, bounded DPO and IPO as published: golden values, gradients, limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.trainers.bdpo import BDPOConfig, bdpo_logit
from diffalign.trainers.cpo import CPOConfig, cpo_loss
from diffalign.trainers.dmpo import DMPOConfig, dmpo_loss
from diffalign.trainers.dpo import dpo_logit, preference_loss
from diffalign.trainers.dspo import DSPOConfig, dspo_loss
from diffalign.trainers.orpo import ORPOConfig, orpo_loss

LN2 = math.log(2)


def at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


M_W, M_L, R_W, R_L = at(0.025), at(0.05), at(0.04), at(0.025)
Z = at(2.0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: preference_loss(Z, "hinge"), 0.0),
        (lambda: preference_loss(-Z, "hinge"), 3.0),
        (lambda: preference_loss(Z, "ipo"), 2.25),
        (lambda: preference_loss(Z, "ipo_raw", beta=100.0), 0.0009),
        (lambda: cpo_loss(M_W, M_L, beta=50.0, alpha=1.0), 0.2769290813453729),
        (lambda: orpo_loss(M_W, M_L, beta=0.1, form="published"), 0.0955725303525525),
        (lambda: orpo_loss(M_W, M_L, beta=0.1, temperature=1.0), 0.0930725303525525),
        (lambda: dmpo_loss(Z, alpha=0.01), 0.19246819394417214),
        (lambda: dspo_loss(at(0.1, 0.2)[None], at(-0.1, 0.0)[None], at(0.002), beta=0.1), 0.025511975012674996),
    ],
)
def test_golden_values(loss: Callable[[], Tensor], expected: float) -> None:
    assert loss().item() == pytest.approx(expected, abs=1e-14)


def test_ipo_as_published_is_the_scaled_form_in_units_of_the_error() -> None:
    z, beta = torch.linspace(-3, 3, 7).double(), 40.0
    label = torch.linspace(0.5, 1, 7).double()
    scaled = preference_loss(z, "ipo", label)
    torch.testing.assert_close(preference_loss(z, "ipo_raw", label, beta=beta) * (beta / 2) ** 2, scaled)


def test_dmpo_at_the_reference_is_not_ln_2_and_its_minimum_is_the_target_preference() -> None:
    assert dmpo_loss(at(0.0), 0.01).item() == pytest.approx(1.6145, abs=1e-4)
    alpha = 0.1
    best = at(math.log((1 - alpha) / alpha)).requires_grad_()
    (slope,) = torch.autograd.grad(dmpo_loss(best, alpha).sum(), best)
    assert dmpo_loss(best, alpha).item() == pytest.approx(0, abs=1e-15) and slope.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dmpo_is_finite_for_logits_that_round_to_certainty(dtype: torch.dtype) -> None:
    z = torch.tensor([-300.0, 300.0], dtype=dtype, requires_grad=True)
    loss = dmpo_loss(z)
    (slope,) = torch.autograd.grad(loss.sum(), z)
    assert bool(loss.isfinite().all()) and bool(slope.isfinite().all())
    assert loss.tolist() == pytest.approx([math.log(100), -math.log(0.99)], rel=1e-5)


def test_orpo_as_published_pushes_the_ratio_the_wrong_way_and_corrected_the_right_way() -> None:
    slopes = {}
    for form in ("published", "corrected"):
        m_w = at(0.025).requires_grad_()
        ratio = orpo_loss(m_w, M_L, beta=1.0, temperature=1.0, form=form) - m_w
        (slopes[form],) = torch.autograd.grad(ratio.sum(), m_w)
    assert slopes["published"].item() < 0 < slopes["corrected"].item()


def test_cpo_without_margin_is_fine_tuning_on_the_chosen() -> None:
    assert cpo_loss(M_W, M_L, beta=1e-12, alpha=1.0).item() == pytest.approx(LN2 + 0.025)


def test_dspo_weighs_the_correction_less_the_surer_the_model() -> None:
    residual, shift = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    plain = residual.square().mean().item()
    assert dspo_loss(residual, shift, at(50.0), beta=3.0).item() == pytest.approx(plain)
    unsure = (residual - 3.0 * 0.5 * shift).square().mean().item()
    assert dspo_loss(residual, shift, at(0.0), beta=3.0).item() == pytest.approx(unsure)


def test_dspo_for_sdxl_switches_on_the_mean_shift_of_the_batch() -> None:
    z = at(0.5, -0.5)
    weight = torch.sigmoid(-z)
    near, far = torch.full((2, 1, 2, 2), 0.1).double(), torch.full((2, 1, 2, 2), 1.0).double()
    torch.testing.assert_close(dspo_loss(near, near, z, 5000.0, "sdxl"), weight.square())
    torch.testing.assert_close(dspo_loss(far, far, z, 5000.0, "sdxl"), weight.square() * 1.0)
    mixed = torch.cat([near[:1], far[:1]])
    torch.testing.assert_close(dspo_loss(mixed, mixed, z, 5000.0, "sdxl"), weight.square() * at(0.01, 1.0))


def test_bounded_dpo_at_lambda_1_is_dpo() -> None:
    logits = [make(M_W, M_L, R_W, R_L, beta=100.0, **more) for make, more in BOUNDED]
    torch.testing.assert_close(logits[0], logits[1])
    assert logits[0].item() == pytest.approx(2.0)


BOUNDED: list[tuple[Any, dict[str, float]]] = [(dpo_logit, {}), (bdpo_logit, {"mixing": 1.0})]


def test_bounded_dpo_starts_at_zero_and_credits_unlearning_only_up_to_the_bound() -> None:
    beta, mixing, temperature = 5000.0, 0.9, 1000.0
    start = bdpo_logit(R_W, R_L, R_W, R_L, beta, mixing, temperature)
    assert start.item() == pytest.approx(0, abs=1e-12)
    ruined = bdpo_logit(R_W, at(9.0), R_W, R_L, beta, mixing, temperature)
    assert ruined.item() == pytest.approx(-0.5 * beta / temperature * math.log(1 - mixing))
    m_l = at(9.0).requires_grad_()
    (slope,) = torch.autograd.grad(bdpo_logit(R_W, m_l, R_W, R_L, beta, mixing, temperature).sum(), m_l)
    assert slope.item() == pytest.approx(0, abs=1e-12)


def test_bounded_dpo_counts_an_improvement_of_the_chosen_as_dpo_does() -> None:
    gain = bdpo_logit(R_W - 1e-3, R_L, R_W, R_L, 5000.0) - bdpo_logit(R_W, R_L, R_W, R_L, 5000.0)
    torch.testing.assert_close(gain, dpo_logit(R_W - 1e-3, R_L, R_W, R_L, 5000.0))


RESIDUAL = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cpo": lambda w, x: cpo_loss(w, x, beta=5.0),
    "orpo": lambda w, x: orpo_loss(w, x, temperature=5.0),
    "orpo published": lambda w, x: orpo_loss(w, x, form="published"),
    "ipo_raw": lambda w, x: preference_loss(dpo_logit(w, x, R_W, R_L, 5.0), "ipo_raw", beta=5.0),
    "dmpo": lambda w, x: dmpo_loss(dpo_logit(w, x, R_W, R_L, 5.0)),
    "bdpo": lambda w, x: bdpo_logit(w, x, R_W, R_L, 5.0, temperature=3.0),
    "dspo": lambda w, x: dspo_loss(RESIDUAL * w[:, None, None], RESIDUAL, dpo_logit(w, x, R_W, R_L, 5.0), 0.3),
    "dspo sdxl": lambda w, x: dspo_loss(RESIDUAL, RESIDUAL, dpo_logit(w, x, R_W, R_L, 5.0), 5.0, "sdxl"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name: str) -> None:
    m_w, m_l = at(0.1, 0.4, 0.7).requires_grad_(), at(0.3, 0.2, 0.6).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], (m_w, m_l))


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (CPOConfig, {"cpo_alpha": -1.0}, "cpo_alpha must be 0 or more"),
        (CPOConfig, {"beta_cpo": 0.0}, "beta_cpo must be above 0"),
        (ORPOConfig, {"orpo_temperature": 0.0}, "orpo_temperature must be above 0"),
        (DMPOConfig, {"dmpo_alpha": 0.0}, "dmpo_alpha must be above 0"),
        (DMPOConfig, {"beta_dpo": -1.0}, "beta_dpo must be above 0"),
        (BDPOConfig, {"bdpo_lambda": 1.5}, "bdpo_lambda must be in"),
        (DSPOConfig, {"beta_dspo": 0.0}, "beta_dspo must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, setting: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(pretrained_model_name_or_path="m", output_dir="o", dataset_name="d", **setting)


def test_dspo_takes_the_published_beta_of_its_form() -> None:
    base: dict[str, Any] = {"pretrained_model_name_or_path": "m", "output_dir": "o", "dataset_name": "d"}
    assert [DSPOConfig(**base, dspo_form=form).beta for form in ("sd15", "sdxl")] == [0.001, 5000.0]
    assert DSPOConfig(**base, beta_dspo=0.5).beta == 0.5
