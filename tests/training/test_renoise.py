"""Noising images of a rollout again: at which timesteps, with which noise, towards which target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.noise import DDPMProcess, FlowProcess, NoiseProcess
from diffalign.training.renoise import Renoised, grid_index, renoise

ABAR = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
PROCESSES = [DDPMProcess(ABAR), DDPMProcess(ABAR, "v_prediction"), FlowProcess()]


class TenSteps:
    """The timesteps of ten steps: 950, 850, ... 50."""

    timesteps = torch.arange(950, -50, -100)

    def __len__(self) -> int:
        return 10


def noised(process: NoiseProcess, x0: Tensor, use: int, choice: Any = "stratified", rollout: int = 0) -> Renoised:
    samples = [(0, rollout, 0, use, seed) for seed in range(len(x0))]
    batch: Any = SimpleNamespace(latents=x0, use=(rollout, 0, use), samples=samples)
    return renoise(process, batch, TenSteps(), 4, choice, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("process", PROCESSES, ids=["epsilon", "v", "flow"])
def test_the_target_stands_for_the_image_in_every_form(process: NoiseProcess) -> None:
    x0 = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for use in range(4):
        given = noised(process, x0, use)
        assert len(given.timesteps.unique()) == 1
        assert given.sigma == pytest.approx(float(process.sigma(given.timesteps)[0]))
        assert torch.allclose(process.to_x0(given.target, given.x_t, given.timesteps), x0, atol=1e-4)


def test_timesteps_are_spread_over_the_passes_and_drawn_anew_each_rollout() -> None:
    x0 = torch.zeros(2, 1, 2, 2)
    drawn = [[int(noised(PROCESSES[0], x0, use, rollout=n).timesteps[0]) for use in range(4)] for n in range(8)]
    assert all(250 * use <= t < 250 * (use + 1) for row in drawn for use, t in enumerate(row))
    assert len({tuple(row) for row in drawn}) == 8
    ours = {int(noised(PROCESSES[0], x0, use, "rollout", n).timesteps[0]) for use in range(4) for n in range(16)}
    assert ours == set(range(850, -50, -100))  # All but the first: 1 to 9.


@pytest.mark.parametrize(("steps", "last"), [(20, 18), (14, 12), (10, 9), (4, 3), (2, 1)])
def test_a_grid_index_is_from_1_to_nine_tenths_of_the_steps(steps: int, last: int) -> None:
    almost_one = 1 - 2**-24
    assert grid_index(steps, 0, 6, 0.0) == 1 and grid_index(steps, 5, 6, almost_one) == last
    found = [grid_index(steps, use, 6, u) for use in range(6) for u in (0.0, 0.5, almost_one)]
    assert found == sorted(found)
    assert grid_index(1, 0, 6, 0.5) == 0  # A single step is all there is.


def test_noise_belongs_to_the_image_and_the_pass_and_not_to_the_batch() -> None:
    x0 = torch.zeros(3, 1, 2, 2)
    whole, again, other = (noised(PROCESSES[2], x0[:n], use) for n, use in ((3, 1), (2, 1), (3, 2)))
    assert torch.equal(whole.x_t[:2], again.x_t)
    noise, fresh = whole.x_t / whole.sigma, other.x_t / other.sigma
    assert not torch.allclose(noise, fresh) and not torch.allclose(noise[0], noise[1])
