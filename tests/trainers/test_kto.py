"""Diffusion-KTO's objective: golden values, gradients, identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.trainers.kto import KTOConfig, kl_point, kl_sums, kto_loss, kto_utility
from diffalign.training.images import sampler_weights

UTILITIES = ["sigmoid", "loss_averse", "risk_seeking"]
LIKED = torch.tensor([True, False])


def bounded(gain: Tensor, liked: Tensor) -> float:
    return max(0.0, kl_point(kl_sums(gain, liked)).item())


def test_golden_values() -> None:
    gain = torch.tensor([0.02, 0.01], dtype=torch.float64)
    kl = bounded(gain, LIKED)
    assert kl == pytest.approx(0.015, abs=1e-15)
    assert kto_loss(gain, LIKED, kl, 100.0).mean().item() == pytest.approx(0.37754066879814535, abs=1e-14)
    gain = torch.tensor([0.015, -0.025], dtype=torch.float64)
    kl = bounded(gain, LIKED)
    assert kl == 0.0
    assert kto_loss(gain, LIKED, kl, 100.0).mean().item() == pytest.approx(0.1291418519137999, abs=1e-14)
    averse = kto_loss(gain, LIKED, kl, 100.0, "loss_averse").mean().item()
    assert averse == pytest.approx(1.140151506137651, abs=1e-14)


def test_golden_sampler_weights() -> None:
    liked = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 0, 0]).bool()
    weights = sampler_weights(liked, 0.8)
    torch.testing.assert_close(weights, torch.where(liked, 4.0, 0.25).double())
    assert weights.sum().item() == pytest.approx(10)
    with pytest.raises(UserError, match="of 3 images 3 are liked and 0 disliked; both kinds are needed"):
        sampler_weights(torch.ones(3).bool(), 0.8)


def test_the_first_loss_is_half_the_mean_weight() -> None:
    gain, liked = torch.zeros(4), torch.tensor([True, True, False, True])
    loss = kto_loss(gain, liked, bounded(gain, liked), 5000.0, "sigmoid", 2.0, 4.0).mean()
    assert loss.item() == 0.5 * (2 + 2 + 4 + 2) / 4


@pytest.mark.parametrize("utility", UTILITIES)
def test_gradients_by_finite_differences(utility: Any) -> None:
    liked = torch.tensor([True, False, True, False, False])
    r = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(m: Tensor) -> Tensor:
        return kto_loss(r - m, liked, 0.1, 3.0, utility, 1.0, 1.5)

    m = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(loss, (m,))


def test_the_gradient_in_closed_form_and_none_through_the_reference_point() -> None:
    gain = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64, requires_grad=True)
    liked = torch.tensor([True, False, True])
    kl = kl_point(kl_sums(gain, liked))
    assert not kl.requires_grad
    kto_loss(gain, liked, kl, 4.0).mean().backward()
    u = torch.where(liked, 1.0, -1.0) * 4.0 * (gain.detach() - kl)
    slope = torch.sigmoid(u) * torch.sigmoid(-u)
    assert gain.grad is not None
    torch.testing.assert_close(gain.grad, -torch.where(liked, 1.0, -1.0) * 4.0 * slope / 3)


@pytest.mark.parametrize("utility", UTILITIES)
def test_liked_and_disliked_weights_balance(utility: Any) -> None:
    """Of n1 likes and n0 dislikes, lambda_D n1 = lambda_U n0 makes no pull on what all images share."""
    liked = torch.tensor([True] * 8 + [False] * 2)
    gain = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    kto_loss(gain, liked, 0.0, 50.0, utility, 1.0, 4.0).mean().backward()
    assert gain.grad is not None
    assert gain.grad.sum().item() == pytest.approx(0, abs=1e-12)
    assert gain.grad[0].item() < 0 < gain.grad[-1].item()


@pytest.mark.parametrize("utility", UTILITIES)
def test_a_dislike_is_a_like_of_the_opposite(utility: Any) -> None:
    gain = torch.linspace(-1, 1, 9).double()
    likes = torch.ones(9).bool()
    torch.testing.assert_close(kto_loss(gain, likes, 0.0, 3.0, utility), kto_loss(-gain, ~likes, 0.0, 3.0, utility))


def test_the_shapes_of_the_utilities() -> None:
    u = torch.linspace(-6, 6, 25).double()
    curvature = {name: kto_utility(u, name).diff(n=2) for name in UTILITIES}  # type: ignore[arg-type]
    assert bool((curvature["loss_averse"] < 0).all()) and bool((curvature["risk_seeking"] > 0).all())
    saturating = curvature["sigmoid"]
    assert bool((saturating[:11] > 0).all()) and bool((saturating[12:] < 0).all())
    assert kto_utility(torch.tensor(50.0)).item() == 1.0


def test_a_batch_of_one_that_improves_gets_no_better() -> None:
    gain = torch.tensor([0.4], dtype=torch.float64)
    loss = kto_loss(gain, LIKED[:1], bounded(gain, LIKED[:1]), 100.0)
    assert loss.item() == 0.5


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    gain = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    liked = gain > -0.3
    parts = sum(kl_sums(g, y) for g, y in zip(gain.split(4), liked.split(4), strict=True))
    torch.testing.assert_close(parts, kl_sums(gain, liked))
    assert kl_point(kl_sums(gain, liked)).item() == pytest.approx(gain.mean().item())


def test_means_per_label_weigh_both_labels_alike() -> None:
    gain, liked = torch.tensor([1.0, 1.0, 1.0, -3.0], dtype=torch.float64), torch.tensor([True, True, True, False])
    assert kl_point(kl_sums(gain, liked)).item() == 0.0
    assert kl_point(kl_sums(gain, liked), "labels").item() == -1.0
    assert kl_point(kl_sums(gain[:3], liked[:3]), "labels").item() == 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta_kto": 0.0}, "beta_kto must be above 0"),
        ({"positive_ratio": 1.0}, "positive_ratio must be in"),
        ({"kl_ema_decay": 1.0}, "kl_ema_decay must be in"),
        ({"undesirable_weight": 0.0}, "undesirable_weight must be above 0"),
        ({"kl_estimate": "mismatched", "train_batch_size": 1}, "train_batch_size 2 or more"),
        ({"data_order": "sequential"}, "positive_ratio draws at random"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KTOConfig(pretrained_model_name_or_path="m", output_dir="o", dataset_name="d", **setting)
