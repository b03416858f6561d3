"""The objectives of DDPO, AWM, DiffusionNFT, reward-weighted regression and reward gradients, as pure functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.noise import DDPMProcess, FlowProcess, NoiseProcess
from diffalign.trainers.awm import elbo_scale, matching_log_prob
from diffalign.trainers.ddpo import clipped_surrogate, score_function
from diffalign.trainers.nft import nft_loss, optimality
from diffalign.trainers.reward_gradient import reward_loss
from diffalign.trainers.rwr import regression_weights
from diffalign.training.advantages import batch_advantages


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pixel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


@pytest.mark.parametrize(("advantage", "expected"), [(2.0, -2.0002), (-2.0, 2.0010002500416717)])
def test_the_clipped_surrogate(advantage: float, expected: float) -> None:
    loss = clipped_surrogate(double(5e-4), double(0.0), double(advantage), 1e-4)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_clipping_stops_the_gradient_only_where_it_would_go_on_in_the_same_direction() -> None:
    log_prob = double(5e-4, 5e-4, -5e-4, -5e-4).requires_grad_()
    clipped_surrogate(log_prob, double(0, 0, 0, 0), double(1, -1, 1, -1), 1e-4).sum().backward()
    assert log_prob.grad is not None
    assert (log_prob.grad != 0).tolist() == [False, True, True, False]


def test_before_any_update_the_surrogate_has_the_gradient_of_the_score_function() -> None:
    log_prob = double(-0.3, 0.7).requires_grad_()
    advantage = double(1.5, -0.5)
    (one,) = torch.autograd.grad(clipped_surrogate(log_prob, log_prob.detach(), advantage, 1e-4).sum(), log_prob)
    (other,) = torch.autograd.grad(score_function(log_prob, advantage).sum(), log_prob)
    assert torch.equal(one, other)
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, double(-0.3, 0.6999), advantage, 0.2), (log_prob,))


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", -0.05),
        ("t", -0.025),
        ("t2", -0.0125),
        ("huber", -0.1117983989867929),
        ("ghuber", -0.9394170541557100),
    ],
)
def test_what_stands_for_a_log_probability(weighting: str, expected: float) -> None:
    x0, noise, v = double(1, -1), double(0.5, 0.5), double(-0.4, 1.2).requires_grad_()
    m = (v - (noise - x0)).square().mean().reshape(1)
    s = matching_log_prob(m, 0.5, weighting)  # type: ignore[arg-type]
    assert s.item() == pytest.approx(expected, abs=1e-12)
    if weighting == "uniform":
        loss = clipped_surrogate(s, s.detach(), double(3 / 5), 1.0)
        assert loss.item() == pytest.approx(-0.6)
        assert torch.autograd.grad(loss.sum(), v)[0].tolist() == pytest.approx([0.06, -0.18])


def test_on_policy_the_gradient_is_that_of_advantage_weighted_matching() -> None:
    m = double(0.05, 0.2, 0.1).requires_grad_()
    a, sigma = double(0.6, -1.0, 0.0), double(0.5, 0.2, 0.9)
    s = matching_log_prob(m, sigma, "ghuber")
    (ours,) = torch.autograd.grad(clipped_surrogate(s, s.detach(), a, 1.0).mean(), m)
    (identity,) = torch.autograd.grad((-a * matching_log_prob(m, sigma, "ghuber")).mean(), m)
    assert torch.allclose(ours, identity, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: matching_log_prob(x, sigma, "ghuber"), (m,))


def test_the_elbo_form_of_a_pull() -> None:
    assert 0.025 * elbo_scale(0.5) == pytest.approx(0.0255102040816326, abs=1e-15)


def test_diffusion_nft() -> None:
    r = optimality(double(2.0))
    assert r.item() == pytest.approx(0.7)
    assert optimality(double(-9.0, 0.0, 9.0)).tolist() == [0, 0.5, 1]
    flow = FlowProcess()
    v = pixel(-1.3).requires_grad_()
    loss = nft_loss(v, pixel(-1.4), pixel(0.4), pixel(1.0), double(400.0), r, flow, 0.1)
    assert loss.item() == pytest.approx(2.08, abs=1e-12)
    # 50 (0.7 * 2 * 0.1 * 0.4 - 0.3 * 2 * 0.1 * 0.4): both weights are the error itself, and have no gradient.
    assert torch.autograd.grad(loss.sum(), v)[0].item() == pytest.approx(1.6, abs=1e-12)
    assert (loss + 1e-4 * (pixel(-1.3) - pixel(-1.35)).square().mean()).item() == pytest.approx(2.08000025)


@pytest.mark.parametrize(
    "process",
    [
        FlowProcess(),
        DDPMProcess(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)),
        DDPMProcess(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64), "v_prediction"),
    ],
)
def test_nft_moves_towards_what_is_liked_and_away_from_what_is_not(process: NoiseProcess) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise, off = torch.randn(3, 2, 1, 2, 2, dtype=torch.float64, generator=generator).unbind()
    t = torch.tensor([300, 600])
    x_t = process.add_noise(x0, noise, t)
    target = process.target(x0, noise, t)
    pred_old = target + 0.3 * off
    pred = pred_old.clone().requires_grad_()
    loss = nft_loss(pred, pred_old, x_t, x0, t, double(1.0, 0.0), process)
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    towards_x0 = ((process.to_x0(pred_old - gradient * 1e-3, x_t, t) - x0).square().flatten(1).mean(1)) < (
        (process.to_x0(pred_old, x_t, t) - x0).square().flatten(1).mean(1)
    )
    assert towards_x0.tolist() == [True, False]
    even = nft_loss(pred, pred_old, x_t, x0, t, double(0.5, 0.5), process)
    assert torch.allclose(torch.autograd.grad(even.sum(), pred)[0], torch.zeros(()).double(), atol=1e-12)


def test_without_an_advantage_nothing_moves() -> None:
    value = double(-0.3).requires_grad_()
    for objective in (
        clipped_surrogate(value, double(-0.3), double(0.0), 1e-4),
        score_function(value, double(0.0)),
        clipped_surrogate(matching_log_prob(-value, 0.5), double(-0.9), double(0.0), 1.0),
    ):
        assert torch.autograd.grad(objective.sum(), value)[0].item() == 0


def test_weights_of_reward_weighted_regression() -> None:
    advantages = double(0.0, 1.0, float("nan"), -2.0)
    weights = regression_weights(advantages, 2.0, "exponential", 1.0)
    assert weights.mean().item() == pytest.approx(1)
    assert weights[2] == 0
    assert (weights[1] / weights[0]).item() == pytest.approx(torch.tensor(2.0).exp().item())
    assert torch.allclose(regression_weights(advantages + 5, 2.0, "exponential", 1.0), weights)


def test_the_sparse_form_keeps_the_best_of_the_rollout() -> None:
    rewards = double(0.1, 0.4, 0.2, 0.3, 0.9, 0.8, 0.7, 0.95, 0.5, 0.05, 0.6, 0.55)
    weights = regression_weights(rewards, 1.0, "sparse", 0.25)
    assert weights.nonzero().flatten().tolist() == [4, 5, 7]
    assert weights.mean().item() == pytest.approx(1)


def test_the_loss_of_a_reward() -> None:
    assert reward_loss(double(0.5, 2.5), 2.0, 1e-3).mean().item() == pytest.approx(7.5e-4)
    assert reward_loss(double(0.5, 2.5)).tolist() == [-0.5, -2.5]


@pytest.mark.parametrize("weighting", ["uniform", "t", "huber", "ghuber"])
def test_advantage_weighted_matching_moves_a_model_of_gaussian_data_to_where_the_reward_is(weighting: str) -> None:
    """A flow whose velocity is exact for N(theta, 1/4) in two dimensions, so that it draws what it models."""
    generator = torch.Generator().manual_seed(0)
    flow, spread, target = FlowProcess(), 0.5, double(1.0, -1.0)
    theta = double(0.0, 0.0).requires_grad_()
    rewards = []
    for _ in range(50):
        x0 = theta.detach() + spread * torch.randn(64, 2, dtype=torch.float64, generator=generator)
        reward = -(x0 - target).square().sum(1).sqrt()
        rewards.append(reward.mean().item())
        advantages = batch_advantages(reward).double().clamp(-5, 5) / 5
        losses = []
        for u in (0.2, 0.5, 0.8):
            t = torch.full((64,), 1000 * u, dtype=torch.float64)
            noise = torch.randn(64, 2, dtype=torch.float64, generator=generator)
            x_t, alpha = flow.add_noise(x0, noise, t), 1 - u
            clean = theta + alpha * spread**2 / (alpha**2 * spread**2 + u**2) * (x_t - alpha * theta)
            m = ((x_t - alpha * clean) / u - clean - flow.target(x0, noise, t)).square().mean(1)
            s = matching_log_prob(m, u, weighting)  # type: ignore[arg-type]
            losses.append(clipped_surrogate(s, s.detach(), advantages, 1.0).mean())
        (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), theta)
        with torch.no_grad():
            theta -= 0.1 * gradient / gradient.norm()
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5
    assert (theta.detach() - target).norm() < 0.3
