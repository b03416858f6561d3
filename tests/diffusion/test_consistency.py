"""The consistency function and its solver: values worked out by hand, what diffusers does, and Gaussian data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from diffalign.diffusion.consistency import (
    boundary_scalings,
    consistency_distance,
    consistency_function,
    guidance_embedding,
    solver_grid,
    solver_step,
)
from diffalign.diffusion.noise import DDPMProcess, FlowProcess, NoiseProcess, from_scheduler_config
from diffalign.diffusion.steps import make_steps
from diffalign.errors import UserError

SD: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pixel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prediction(process: NoiseProcess, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
    """What a network of this kind says, if it believes in x0 and epsilon."""
    return process.target(x0, epsilon, t)


def test_boundary_scalings_are_those_worked_out_by_hand() -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([39]))
    assert c_skip.item() == pytest.approx(1.6436527882104073e-06, rel=1e-14)
    assert c_out.item() == pytest.approx(0.9999991781732682, abs=1e-15)


@pytest.mark.parametrize("scaling", [10.0, 0.02])
def test_boundary_scalings_are_those_of_the_scheduler(scaling: float) -> None:
    scheduler = LCMScheduler(timestep_scaling=scaling)
    for t in (0, 1, 19, 259, 999):
        ours = [value.item() for value in boundary_scalings(torch.tensor([t]), scaling)]
        assert ours == pytest.approx(scheduler.get_scalings_for_boundary_condition_discrete(t), abs=1e-15)


def test_a_guided_solver_step_has_the_values_worked_out_by_hand() -> None:
    process = DDPMProcess(numbers(0.4, 0.3))
    t, previous, x = torch.tensor([1]), torch.tensor([0]), pixel(0.8)
    x_previous = solver_step(process, pixel(0.5), pixel(0.3), numbers(7.0), x, t, previous)
    assert x_previous.item() == pytest.approx(0.5599197144115571, abs=1e-14)
    # Guidance of x_0 and of epsilon by themselves, as the card has them.
    epsilon = 0.5 + 7 * (0.5 - 0.3)
    x0 = process.to_x0(pixel(epsilon), x, t).item()
    assert (epsilon, x0) == (pytest.approx(1.9), pytest.approx(-1.4417044534582564, abs=1e-14))


def test_distances_are_those_worked_out_by_hand() -> None:
    difference = numbers(0.1, -0.2, 0.0).reshape(1, 3)
    huber = consistency_distance(difference, torch.zeros_like(difference))
    assert huber.item() == pytest.approx(0.09933583328646049, abs=1e-16)
    assert consistency_distance(difference, 0 * difference, "l2").item() == pytest.approx(0.05 / 3, abs=1e-16)
    assert consistency_distance(difference.half(), 0 * difference.half()).dtype == torch.float32


def test_the_guidance_embedding_has_the_values_worked_out_by_hand() -> None:
    embedded = guidance_embedding(numbers(0.002), 4)
    expected = numbers(0.9092974268, 0.0001999999987, -0.4161468365, 0.99999998).reshape(1, 4)
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-10)
    assert guidance_embedding(torch.tensor([3.0, 14.0]), 256).shape == (2, 256)


def test_the_grid_is_that_of_the_scheduler_and_ends_at_the_boundary() -> None:
    process = from_scheduler_config(SD)
    grid = solver_grid(process, 50)
    scheduler = LCMScheduler()
    scheduler.set_timesteps(50)
    assert grid.timesteps.flip(0).tolist() == scheduler.timesteps.tolist()
    assert grid.timesteps[[0, 1, 49]].tolist() == [19, 39, 999]
    assert grid.previous[[0, 1, 49]].tolist() == [0, 19, 979]
    assert isinstance(process, DDPMProcess)
    abar = process.alphas_cumprod
    by_index = torch.cat([abar[:1], abar[grid.timesteps[:-1]]])
    torch.testing.assert_close(process.alpha(grid.previous) ** 2, by_index, rtol=1e-14, atol=0)
    flow = solver_grid(FlowProcess(), 4)
    assert flow.timesteps.tolist() == [250, 500, 750, 1000] and flow.previous.tolist() == [0, 250, 500, 750]
    for wrong in (0, 1001):
        with pytest.raises(UserError, match=f"1 to 1000 timesteps, got {wrong}"):
            solver_grid(process, wrong)


@pytest.mark.parametrize("kind", [*PREDICTIONS, "flow"])
def test_at_the_boundary_the_function_is_the_identity(kind: str) -> None:
    abar = from_scheduler_config(SD).alphas_cumprod  # type: ignore[attr-defined]
    process: NoiseProcess = FlowProcess() if kind == "flow" else DDPMProcess(abar, kind)
    x, pred = normal(2, 3, 1, 2, 2)
    assert torch.equal(consistency_function(process, pred, x, torch.zeros(3)), x)
    assert consistency_function(process, pred.half(), x.half(), torch.full((3,), 499)).dtype == torch.float32


@pytest.mark.parametrize("kind", [*PREDICTIONS, "flow"])
def test_every_prediction_type_takes_the_same_step(kind: str) -> None:
    reference = from_scheduler_config(SD)
    process: NoiseProcess = FlowProcess() if kind == "flow" else DDPMProcess(reference.alphas_cumprod, kind)  # type: ignore[attr-defined]
    grid = solver_grid(process, 50)
    index = torch.tensor([0, 20, 49 if kind != "flow" else 48])
    t, previous, w = grid.timesteps[index], grid.previous[index], numbers(0.0, 7.0, 3.0)
    x, noise = normal(2, 3, 1, 2, 2, seed=1)
    other = noise + normal(3, 1, 2, 2, seed=2)
    branches = []
    for epsilon in (noise, other):
        alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in (process.alpha(t), process.sigma(t)))
        branches.append(((x - sigma * epsilon) / alpha, epsilon))
    cond, uncond = (prediction(process, x0, epsilon, t) for x0, epsilon in branches)
    ours = solver_step(process, cond, uncond, w, x, t, previous)
    g = w.reshape(-1, 1, 1, 1)
    x0, epsilon = (a + g * (a - b) for a, b in zip(*branches, strict=True))
    torch.testing.assert_close(ours, process.add_noise(x0, epsilon, previous), rtol=1e-11, atol=1e-11)


def test_a_step_is_that_of_ddim_in_diffusers() -> None:
    scheduler = DDIMScheduler.from_config(SD)
    scheduler.set_timesteps(50)
    process, pred = from_scheduler_config(SD), normal(1, 4, 2, 2).float()
    grid, x = solver_grid(process, 50), normal(1, 4, 2, 2, seed=1).float()
    for i in (1, 20, 49):
        t = grid.timesteps[[i]]
        theirs = scheduler.step(pred, int(t), x, eta=0.0, return_dict=False)[0]
        ours = solver_step(process, pred, 0 * pred, torch.zeros(1), x, t, grid.previous[[i]])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def gaussian_losses(num_steps: int) -> Tensor:
    """LCD losses of the exact consistency function of N(0.7, 0.5^2), taught by the exact denoiser: one a grid step."""
    process, mean, spread = from_scheduler_config(SD), 0.7, 0.5
    grid = solver_grid(process, num_steps)
    t, previous = grid.timesteps, grid.previous

    def level(at: Tensor) -> Tensor:
        return (process.alpha(at) ** 2 * spread**2 + process.sigma(at) ** 2).sqrt().reshape(-1, 1, 1, 1)

    def alpha(at: Tensor) -> Tensor:
        return process.alpha(at).reshape(-1, 1, 1, 1)

    def end(x: Tensor, at: Tensor) -> Tensor:
        zero = torch.zeros(1)
        return alpha(zero) * mean + level(zero) / level(at) * (x - alpha(at) * mean)

    x = alpha(t) * mean + level(t) * normal(len(t), 1, 8, 8)
    epsilon = process.sigma(t).reshape(-1, 1, 1, 1) * (x - alpha(t) * mean) / level(t) ** 2
    x_previous = solver_step(process, epsilon, epsilon, torch.zeros(len(t)), x, t, previous)
    # t' = 0 is the boundary: there the target is the solver's point itself.
    torch.testing.assert_close(end(x_previous, previous)[0], x_previous[0], rtol=0, atol=1e-14)
    return consistency_distance(end(x, t), end(x_previous, previous), "l2")


def test_the_exact_function_of_gaussian_data_has_no_loss_but_the_solvers_error() -> None:
    coarse, fine = gaussian_losses(50), gaussian_losses(200)
    assert coarse.max() < 1e-3 * 0.5**2
    # The error of a step is of second order, its square of fourth: 4^4 = 256 for a grid four times as fine.
    assert fine.mean() < coarse.mean() / 100
    assert coarse.mean() > 0, "the solver is not exact, so a loss of 0 would show nothing"


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("distance", ["huber", "l2"])
def test_the_gradient_of_the_loss_is_that_of_its_formula(kind: str, distance: Any) -> None:
    process = DDPMProcess(from_scheduler_config(SD).alphas_cumprod, kind)  # type: ignore[attr-defined]
    x, target = normal(2, 2, 1, 2, 2, seed=3)
    t = torch.tensor([19, 599])

    def loss(pred: Tensor) -> Tensor:
        return consistency_distance(consistency_function(process, pred, x, t), target, distance).mean()

    assert torch.autograd.gradcheck(loss, (normal(2, 1, 2, 2, seed=4).requires_grad_(),))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_few_step_sampling_is_that_of_the_scheduler(num_steps: int, kind: str) -> None:
    config = {**SD, "prediction_type": kind, "timestep_scaling": 0.05}
    scheduler = LCMScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    steps = make_steps(from_scheduler_config(config), config, num_steps, "lcm")
    assert steps.timesteps.tolist() == scheduler.timesteps.tolist()
    if num_steps == 4:
        assert steps.timesteps.tolist() == [999, 759, 499, 259]
    x, pred = normal(2, 1, 4, 2, 2, seed=5).float()
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(pred, t, x, generator=torch.Generator().manual_seed(i), return_dict=False)[0]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(steps.step(pred, x, torch.tensor([i])).sample(noise), theirs, rtol=1e-4, atol=1e-4)
    assert steps.std[-1] == 0, "the last f is the sample"


def test_more_steps_than_were_distilled_on_are_refused() -> None:
    with pytest.raises(UserError, match="at most 50 steps, got 51"):
        make_steps(from_scheduler_config(SD), SD, 51, "lcm")
