"""The objective of supervised fine-tuning: golden values, weights, gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffalign.diffusion.error import per_sample_mse
from diffalign.diffusion.noise import DDPMProcess, FlowProcess
from diffalign.errors import UserError
from diffalign.trainers.sft import SFTConfig, min_snr_weight, sft_loss

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def test_golden_values() -> None:
    m = per_sample_mse(torch.tensor([[0.1, 0.2], [0.3, 0.1]], dtype=torch.float64), torch.zeros(2, 2).double())
    torch.testing.assert_close(m, torch.tensor([0.025, 0.05], dtype=torch.float64), atol=1e-15, rtol=0)
    one = torch.ones(2)
    masked = sft_loss(m, one, torch.tensor([1.0, 0.0])).mean()
    assert masked.item() == pytest.approx(0.0125, abs=1e-15)
    assert sft_loss(m[:1], one[:1]).mean().item() == pytest.approx(0.025, abs=1e-15)


def test_without_labels_and_weights_it_is_the_mean_squared_error() -> None:
    pred, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    loss = sft_loss(per_sample_mse(pred, target), torch.ones(3)).mean()
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(pred, target))


def test_gradients_by_finite_differences() -> None:
    weight, label = (
        torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64),
        torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64),
    )

    def loss(pred: Tensor) -> Tensor:
        return sft_loss(per_sample_mse(pred, torch.zeros_like(pred)), weight, label).mean()

    pred = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(loss, (pred,))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_those_of_diffusers(prediction: str) -> None:
    t = torch.tensor([0, 10, 300, 700, 999])
    snr = compute_snr(SCHEDULER, t)
    clipped = torch.stack([snr, torch.full_like(snr, 5.0)], 1).min(1)[0]
    expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction]
    weight = min_snr_weight(DDPMProcess(SCHEDULER.alphas_cumprod, prediction), t, 5.0)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
    assert weight.dtype == torch.float32


def test_min_snr_weights_are_finite_where_there_is_no_signal() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    for prediction in DDPMProcess.PREDICTION_TYPES:
        weight = min_snr_weight(DDPMProcess(scheduler.alphas_cumprod, prediction), torch.tensor([999]), 5.0)
        assert bool(weight.isfinite().all())


def test_a_flow_has_no_min_snr_weight() -> None:
    with pytest.raises(UserError, match="this one predicts flow. Leave snr_gamma out"):
        min_snr_weight(FlowProcess(), torch.tensor([500]), 5.0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="snr_gamma must be above 0"):
        SFTConfig(pretrained_model_name_or_path="m", output_dir="o", dataset_name="d", snr_gamma=0.0)
