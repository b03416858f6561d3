"""Power spectra: against signals whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from diffalign.evaluation.spectrum import fine_power, radial_power


def noise(count: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    gray = torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gray.expand(-1, 3, -1, -1)


def test_white_noise_has_its_variance_everywhere() -> None:
    _, power = radial_power(0.1 * noise(64), bins=16)
    assert power.shape == (64, 16)
    # The mean that is taken out was part of the lowest ring.
    assert torch.allclose(power.mean(0)[1:], torch.full((15,), 0.01, dtype=torch.float64), rtol=0.1)


def test_a_wave_lies_in_the_ring_of_its_frequency_whatever_its_direction() -> None:
    x = torch.arange(64, dtype=torch.float64)
    for frequency in (5 / 64, 20 / 64):
        wave = torch.sin(2 * math.pi * frequency * x)
        images = torch.stack([wave.expand(64, 64), wave[:, None].expand(64, 64)])[:, None].expand(-1, 3, -1, -1)
        middles, power = radial_power(images, bins=16)
        assert (middles[power.argmax(1)] - frequency).abs().max() <= 0.5 / 16
        assert torch.allclose(power[0], power[1])


def test_blur_takes_fine_power_and_brightness_changes_nothing() -> None:
    images = 0.5 + 0.1 * noise(8)
    middles, sharp = radial_power(images)
    _, blurred = radial_power(gaussian_blur(images, [7, 7], [1.5, 1.5]))
    _, brighter = radial_power(images + 0.2)
    assert (fine_power(middles, blurred) < 0.05 * fine_power(middles, sharp)).all()
    assert torch.allclose(brighter, sharp)


def test_a_gradient_has_no_seam() -> None:
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    middles, power = radial_power(ramp)
    assert fine_power(middles, power).item() < 1e-6 * power[0, 0].item()


def test_too_many_rings_are_refused() -> None:
    with pytest.raises(ValueError, match="take at most 16"):
        radial_power(noise(1, 32), bins=32)
