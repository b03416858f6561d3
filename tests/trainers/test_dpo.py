"""Diffusion-DPO's objective: golden values, gradients, identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.error import per_sample_mse
from diffalign.errors import UserError
from diffalign.trainers.dpo import DPOConfig, dpo_logit, preference_loss

LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.2)]


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and reference predictions on a pair of two-element latents with target 0."""
    policy_w = torch.tensor([[0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    policy_l = torch.tensor([[0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    return (
        policy_w,
        policy_l,
        torch.tensor([[0.2, 0.2]], dtype=torch.float64),
        torch.tensor([[0.2, 0.1]], dtype=torch.float64),
    )


def logit(policy_w: Tensor, policy_l: Tensor, reference_w: Tensor, reference_l: Tensor, beta: float = 100.0) -> Tensor:
    errors = [per_sample_mse(p, torch.zeros_like(p)) for p in (policy_w, policy_l, reference_w, reference_l)]
    return dpo_logit(*errors, beta=beta)


def errors(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn = torch.rand(4, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    m_w, m_l, r_w, r_l = drawn
    return m_w, m_l, r_w, r_l


def test_golden_loss_and_gradient() -> None:
    policy_w, policy_l, reference_w, reference_l = example()
    z = logit(policy_w, policy_l, reference_w, reference_l)
    loss = preference_loss(z).mean()
    loss.backward()
    assert z.item() == pytest.approx(2.0, abs=1e-12)
    assert loss.item() == pytest.approx(0.1269280110429725, abs=1e-14)
    assert policy_w.grad is not None and policy_l.grad is not None
    torch.testing.assert_close(policy_w.grad, torch.tensor([[0.59601461, 1.19202922]]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(policy_l.grad, torch.tensor([[-1.78804383, -0.59601461]]).double(), atol=1e-7, rtol=0)


def test_golden_loss_with_the_pair_the_other_way_round() -> None:
    policy_w, policy_l, reference_w, reference_l = example()
    z = logit(policy_l, policy_w, reference_l, reference_w)
    assert preference_loss(z).item() == pytest.approx(2.1269280110429727, abs=1e-14)


def test_errors_are_means_so_beta_does_not_depend_on_resolution() -> None:
    small, large = torch.full((2, 4, 8, 8), 0.5), torch.full((2, 4, 16, 16), 0.5)
    assert torch.equal(per_sample_mse(small, small * 0), per_sample_mse(large, large * 0))


def test_half_precision_predictions_are_widened_before_they_are_subtracted() -> None:
    pred = torch.full((1, 4), 0.3, dtype=torch.bfloat16)
    target = torch.full((1, 4), 0.2999)
    expected = (pred.float() - target).square().mean()
    assert per_sample_mse(pred, target).item() == expected.item() > 0


def test_the_first_loss_is_exactly_ln_2() -> None:
    m_w, m_l, _, _ = (e.float() for e in errors())
    loss = preference_loss(dpo_logit(m_w, m_l, m_w, m_l, beta=5000.0)).mean()
    assert loss.item() == torch.tensor(math.log(2), dtype=torch.float32).item()


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_gradients_by_finite_differences(loss_type: str, smoothing: float) -> None:
    label = torch.tensor([1.0, 0.5, 0.8, 1.0, 0.6, 1.0]).double()

    def loss(m_w: Tensor, m_l: Tensor) -> Tensor:
        _, _, r_w, r_l = errors(seed=1)
        return preference_loss(dpo_logit(m_w, m_l, r_w, r_l, 3.0), loss_type, label, smoothing)  # type: ignore[arg-type]

    m_w, m_l, _, _ = errors()
    assert torch.autograd.gradcheck(loss, (m_w.requires_grad_(), m_l.requires_grad_()))


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_at_equal_models_every_loss_favours_the_chosen_image(loss_type: str, smoothing: float) -> None:
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    preference_loss(z, loss_type, label_smoothing=smoothing).sum().backward()  # type: ignore[arg-type]
    assert z.grad is not None and z.grad.item() < 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_a_tie_has_its_minimum_at_equal_preference(loss_type: str) -> None:
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    preference_loss(z, loss_type, torch.tensor([0.5]).double()).sum().backward()  # type: ignore[arg-type]
    assert z.grad is not None and z.grad.item() == pytest.approx(0, abs=1e-15)


def test_a_soft_label_is_the_mean_of_the_two_orders() -> None:
    z = torch.tensor([1.3]).double()
    mixed = preference_loss(z, label=torch.tensor([0.7]).double())
    torch.testing.assert_close(mixed, 0.7 * preference_loss(z) + 0.3 * preference_loss(-z))


def test_swapping_a_pair_and_its_label_changes_nothing() -> None:
    z, label = torch.linspace(-3, 3, 7).double(), torch.linspace(0, 1, 7).double()
    for loss_type, smoothing in LOSSES:
        there = preference_loss(z, loss_type, label, smoothing)  # type: ignore[arg-type]
        back = preference_loss(-z, loss_type, 1 - label, smoothing)  # type: ignore[arg-type]
        torch.testing.assert_close(there, back)


def test_robust_without_noise_is_the_sigmoid_loss() -> None:
    z = torch.linspace(-4, 4, 9).double()
    torch.testing.assert_close(preference_loss(z, "robust", label_smoothing=0.0), preference_loss(z))


def test_robust_is_unbiased_under_flipped_labels() -> None:
    z, flips = torch.linspace(-4, 4, 9).double(), 0.3
    observed = (1 - flips) * preference_loss(z, "robust", label_smoothing=flips) + flips * preference_loss(
        -z, "robust", label_smoothing=flips
    )
    torch.testing.assert_close(observed, preference_loss(z))


def test_ipo_is_the_published_loss_scaled_by_half_beta_squared() -> None:
    m_w, m_l, r_w, r_l = errors()
    beta = 40.0
    h, b = -((m_w - m_l) - (r_w - r_l)), beta / 2
    published = (h - 1 / (2 * b)).square()
    torch.testing.assert_close(preference_loss(dpo_logit(m_w, m_l, r_w, r_l, beta), "ipo"), published * b**2)


def test_hinge_is_flat_once_the_margin_is_reached() -> None:
    assert preference_loss(torch.tensor([1.0, 5.0]), "hinge").tolist() == [0.0, 0.0]
    assert preference_loss(torch.tensor([-1.0]), "hinge").item() == 2.0


def test_pairs_do_not_touch_each_other() -> None:
    together = preference_loss(dpo_logit(*errors(), beta=50.0))
    alone = torch.cat([preference_loss(dpo_logit(*(e[i : i + 1] for e in errors()), beta=50.0)) for i in range(6)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta_dpo": 0.0}, "beta_dpo must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"loss_type": "robust"}, "robust needs label_smoothing"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"resolution": 100}, "divisible by 8.*104|divisible by 8.*96"),
        ({"train_batch_size": 0}, "train_batch_size must be at least 1"),
        ({"train_mode": "full", "train_text_encoder": True}, "needs train_mode lora"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, object], message: str) -> None:
    base = {"pretrained_model_name_or_path": "m", "output_dir": "o", "dataset_name": "d"}
    with pytest.raises(UserError, match=message):
        DPOConfig(**{**base, **setting})  # type: ignore[arg-type]
