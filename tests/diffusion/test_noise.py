"""Noise processes: forward and back are inverses, targets are what the papers say, configs are read right."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from diffalign.diffusion.noise import DDPMProcess, FlowProcess, NoiseProcess, from_scheduler_config
from diffalign.errors import UserError

ABAR = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
PROCESSES: list[NoiseProcess] = [
    DDPMProcess(ABAR, "epsilon"),
    DDPMProcess(ABAR, "v_prediction"),
    DDPMProcess(ABAR, "sample"),
    FlowProcess(),
]
NAMES = ["epsilon", "v", "sample", "flow"]
T = torch.tensor([1, 250, 999])


def draw(seed: int) -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_target_leads_back_to_the_clean_latents_and_the_noise(process: NoiseProcess) -> None:
    x0, noise = draw(0), draw(1)
    x_t, target = process.add_noise(x0, noise, T), process.target(x0, noise, T)
    torch.testing.assert_close(process.to_x0(target, x_t, T), x0)
    torch.testing.assert_close(process.to_epsilon(target, x_t, T), noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_diffusers(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    process = from_scheduler_config({**scheduler.config, "prediction_type": prediction_type})
    x0, noise = draw(0).float(), draw(1).float()
    torch.testing.assert_close(process.add_noise(x0, noise, T), scheduler.add_noise(x0, noise, T))
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, T)
    torch.testing.assert_close(process.target(x0, noise, T), expected)


def test_zero_terminal_snr_is_read_from_the_config() -> None:
    config = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).config
    assert from_scheduler_config(config).snr(torch.tensor([999])).item() == pytest.approx(0, abs=1e-7)


def test_flow_velocity_is_noise_minus_data() -> None:
    x0, noise = draw(0), draw(1)
    process = FlowProcess()
    assert torch.equal(process.target(x0, noise, T), noise - x0)
    half = torch.full((3,), 500.0)
    torch.testing.assert_close(process.add_noise(x0, noise, half), (x0 + noise) / 2)


def test_timesteps_are_uniform_integers_over_the_whole_range() -> None:
    t = DDPMProcess(ABAR).sample_timesteps(torch.tensor([0.0, 0.5, 0.99999994]))
    assert t.tolist() == [0, 500, 999] and t.dtype == torch.int64


def test_flow_times_are_logit_normal() -> None:
    u = (torch.arange(20000) + 0.5) / 20000
    s = FlowProcess(logit_mean=0.3, logit_std=0.8).sample_timesteps(u) / 1000
    logits = torch.logit(s.double())
    assert logits.mean().item() == pytest.approx(0.3, abs=1e-3)
    assert logits.std().item() == pytest.approx(0.8, abs=5e-3)


def test_a_scheduler_without_betas_is_an_error_that_says_so() -> None:
    with pytest.raises(UserError, match="no beta_schedule"):
        from_scheduler_config({"_class_name": "Mystery"})


def test_an_unknown_prediction_type_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="Did you mean 'v_prediction'"):
        from_scheduler_config({"beta_schedule": "linear", "prediction_type": "v_predict"})
