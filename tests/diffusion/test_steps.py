"""One Gaussian kernel: DDIM with eta, the flow SDEs, and what diffusers does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal

from diffalign.diffusion.noise import DDPMProcess, FlowProcess, from_scheduler_config
from diffalign.diffusion.steps import Steps, coefficients, make_steps
from diffalign.errors import UserError

FIRST = torch.tensor([0])
SD: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def pixel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def flow_step(sampler: Any, sigma: float, sigma_next: float, eta: float) -> Steps:
    levels = torch.tensor([sigma, sigma_next], dtype=torch.float64)
    return Steps(FlowProcess(), levels[:1] * 1000, 1 - levels, levels, *coefficients(sampler, 1 - levels, levels, eta))


def test_ddim_with_eta_has_the_values_worked_out_by_hand() -> None:
    alpha = torch.tensor([0.5, 0.8], dtype=torch.float64).sqrt()
    sigma = (1 - alpha**2).sqrt()
    process = DDPMProcess(torch.tensor([0.8, 0.5], dtype=torch.float64))
    steps = Steps(process, torch.tensor([1]), alpha, sigma, *coefficients("ddim", alpha, sigma, 1.0))
    step = steps.step(pixel(0.2), pixel(1.0), FIRST)
    assert step.std.item() == pytest.approx(0.3872983346207417, abs=1e-12)
    assert step.x0.item() == pytest.approx(1.2142135623730950, abs=1e-12)
    assert step.mean.item() == pytest.approx(1.1307469854173642, abs=1e-12)
    assert step.log_prob(pixel(0.9)).item() == pytest.approx(-0.1478591116924028, abs=1e-12)


@pytest.mark.parametrize(
    ("sampler", "eta", "levels", "std", "mean", "log_prob"),
    [
        ("flow_sde", 0.7, (0.8, 0.6), 0.6260990336999412, 0.4522, -0.4785551299353662),
        ("flow_sde", 0.7, (1.0, 0.9), 0.7, 0.4075, -0.6000760892659400),
        ("dance", 0.3, (0.8, 0.6), 0.1341640786499874, 0.55505, 1.0336281578938689),
        ("cps", 0.7, (0.8, 0.6), 0.5346039145130207, 0.4158534919312403, None),
    ],
)
def test_the_flow_samplers_have_the_values_worked_out_by_hand(
    sampler: str, eta: float, levels: tuple[float, float], std: float, mean: float, log_prob: float | None
) -> None:
    step = flow_step(sampler, *levels, eta).step(pixel(-0.3), pixel(0.5), FIRST)
    assert step.std.item() == pytest.approx(std, abs=1e-12)
    assert step.mean.item() == pytest.approx(mean, abs=1e-12)
    if log_prob is not None:
        assert step.log_prob(pixel(0.6)).item() == pytest.approx(log_prob, abs=1e-12)
    else:  # What the authors of CPS take for one: the error alone.
        assert -((0.6 - step.mean.item()) ** 2) == pytest.approx(-0.0339099364339178, abs=1e-12)


def test_dance_with_the_rate_of_flow_grpo_is_flow_grpo() -> None:
    rate = 0.7 * (0.8 / 0.2) ** 0.5
    ours, theirs = flow_step("dance", 0.8, 0.6, rate), flow_step("flow_sde", 0.8, 0.6, 0.7)
    assert torch.allclose(ours.std, theirs.std, atol=1e-12) and torch.allclose(ours.eps_coef, theirs.eps_coef)


@pytest.mark.parametrize(
    ("config", "sampler", "eta"),
    [(SD, "ddim", 1.0), (FLOW, "ddim", 1.0), (FLOW, "flow_sde", 0.7), (FLOW, "dance", 0.3), (FLOW, "cps", 0.8)],
)
def test_log_prob_is_the_mean_of_the_density_of_torch(config: dict[str, Any], sampler: Any, eta: float) -> None:
    steps = make_steps(from_scheduler_config(config), config, 10, sampler, eta)
    pred, x, x_next = torch.randn(3, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    step = steps.step(pred, x, torch.tensor([2, 7]))
    assert step.mean.dtype == torch.float32
    normal = Normal(step.mean, step.std.reshape(2, 1, 1, 1))
    assert torch.allclose(step.log_prob(x_next), normal.log_prob(x_next).flatten(1).mean(1), atol=1e-6)
    assert step.log_prob(step.mean).shape == (2,)
    assert bool((step.log_prob(step.mean) > step.log_prob(x_next)).all())


def test_the_gradient_of_log_prob_reaches_the_prediction_and_not_the_next_latents() -> None:
    steps = make_steps(from_scheduler_config(SD), SD, 5)
    x, x_next = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    index = torch.tensor([1, 3])
    pred = torch.zeros_like(x, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: steps.step(p, x, index).log_prob(x_next), (pred,))
    moved = x_next.clone().requires_grad_()
    steps.step(pred, x, index).log_prob(moved).sum().backward()
    assert moved.grad is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_every_ddim_step_is_that_of_diffusers(prediction_type: str, spacing: str, eta: float) -> None:
    config = {**SD, "prediction_type": prediction_type, "timestep_spacing": spacing}
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(20)
    steps = make_steps(from_scheduler_config(config), config, 20, eta=eta)
    assert torch.equal(steps.timesteps, scheduler.timesteps)
    noise, pred, x = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(2)).unbind()
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(pred, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]
        assert torch.allclose(steps.step(pred, x, torch.tensor([i])).sample(noise), theirs, atol=2e-5)


def test_eta_1_is_the_ddpm_scheduler_of_diffusers() -> None:
    config = {"beta_schedule": "linear", "timestep_spacing": "trailing", "clip_sample": False}
    steps = make_steps(from_scheduler_config(config), config, 10, "ddim", eta=1.0)
    scheduler = DDPMScheduler.from_config(config)
    scheduler.set_timesteps(10)
    x, prediction = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(scheduler.timesteps[:-1]):
        step = steps.step(prediction, x, torch.tensor([i]))
        noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
        theirs = scheduler.step(prediction, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        assert torch.allclose(step.sample(noise), theirs, atol=1e-4)


def test_a_flow_without_noise_is_the_euler_step_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    scheduler.set_timesteps(8)
    steps = make_steps(from_scheduler_config(FLOW), FLOW, 8, eta=0.0)
    assert steps.stochastic == []
    pred, x = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(3)).unbind()
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(pred, t, x, return_dict=False)[0]
        assert torch.allclose(steps.step(pred, x, torch.tensor([i])).mean, theirs, atol=1e-5)


@pytest.mark.parametrize(("sampler", "eta"), [("flow_sde", 0.7), ("dance", 0.5), ("ddim", 1.0)])
def test_noise_keeps_the_distribution_of_the_ode(sampler: Any, eta: float) -> None:
    """With the exact velocity of Gaussian data, every sampler ends at the data's own spread."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    steps = make_steps(from_scheduler_config(config), config, 100, sampler, eta)
    generator = torch.Generator().manual_seed(4)
    mean, spread = 0.7, 0.5
    x = torch.randn(20000, 1, 1, 1, generator=generator, dtype=torch.float64)
    for i in range(len(steps)):
        alpha, sigma = steps.alpha[i], steps.sigma[i]
        x0 = mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)
        velocity = (x - alpha * x0) / sigma - x0
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = steps.step(velocity, x, torch.full((len(x),), i)).sample(noise)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(spread, abs=0.02)


def test_the_last_step_of_a_schedule_that_ends_clean_has_no_density() -> None:
    config = {**SD, "set_alpha_to_one": True}
    steps = make_steps(from_scheduler_config(config), config, 4)
    assert steps.stochastic == [0, 1, 2]
    last = steps.step(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([3]))
    with pytest.raises(ValueError, match="no log-probability"):
        last.log_prob(last.mean)
    assert make_steps(from_scheduler_config(SD), SD, 4).stochastic == [0, 1, 2, 3]


def test_kl_of_equal_steps_is_zero_and_grows_with_their_distance() -> None:
    steps = flow_step("cps", 0.8, 0.6, 0.7)
    here, there = steps.step(pixel(0.0), pixel(0.5), FIRST), steps.step(pixel(0.4), pixel(0.5), FIRST)
    assert here.kl(here).item() == 0
    expected = ((here.mean - there.mean) ** 2 / (2 * here.std**2)).item()
    assert here.kl(there).item() == pytest.approx(expected)


@pytest.mark.parametrize("config", [SD, FLOW])
def test_ddim_at_eta_1_draws_from_the_posterior(config: dict[str, Any]) -> None:
    """q(x' | x, x_0) by Bayes: the prior of x' at its level times the likelihood of x given x'."""
    steps = make_steps(from_scheduler_config(config), config, 12, eta=1.0)
    for i in steps.stochastic[1:]:
        (a, a_next), (s, s_next) = (steps.alpha[i], steps.alpha[i + 1]), (steps.sigma[i], steps.sigma[i + 1])
        ratio = a / a_next
        precision = 1 / s_next**2 + ratio**2 / (s**2 - (ratio * s_next) ** 2)
        assert steps.std[i].item() == pytest.approx(float(precision**-0.5), rel=1e-9)


def test_what_cannot_be_sampled_is_refused() -> None:
    process = from_scheduler_config(SD)
    with pytest.raises(UserError, match="Did you mean 'ddim'"):
        make_steps(process, SD, 4, "dimm")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="for flow models"):
        make_steps(process, SD, 4, "flow_sde")
    with pytest.raises(UserError, match="at least 1 step"):
        make_steps(process, SD, 0)


def test_more_noise_than_a_step_holds_is_refused_with_the_most_that_it_does() -> None:
    process = from_scheduler_config(SD)
    with pytest.raises(UserError, match="eta 1.5 adds more noise") as error:
        make_steps(process, SD, 10, eta=1.5)
    most = float(str(error.value).split()[-1])
    assert 1 < most < 1.5
    steps = make_steps(process, SD, 10, eta=most - 1e-3)
    assert bool((steps.std <= steps.sigma[1:]).all())
