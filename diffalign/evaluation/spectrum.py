"""Power spectra of images: where in fineness their contrast lies. Fine noise that a reward put there shows in it.

Power is that of the discrete Fourier transform of luma without its mean, under a Hann window (or the seam between
opposite borders would be taken for fine detail), averaged over all directions. Frequencies are in cycles a pixel,
0.5 being the finest.
"""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
FINE = 0.25
"""Frequencies from here on are called fine: structures below 4 pixels."""


def radial_power(images: Tensor, bins: int = 32) -> tuple[Tensor, Tensor]:
    """Mean power of each image in rings of frequency.

    Args:
        images: (N, 3, H, W) in [0, 1], of at least ``2 * bins`` pixels a side.
        bins: rings of equal width over (0, 0.5].

    Returns:
        Middles of the rings, (bins,), and power, (N, bins), float64. White noise of variance s^2 has s^2 in each.

    Raises:
        ValueError: the images are too small for so many rings.
    """
    height, width = images.shape[-2:]
    if min(height, width) < 2 * bins:
        raise ValueError(
            f"images of {height}x{width} pixels have no {bins} rings; take at most {min(height, width) // 2}"
        )
    luma = torch.einsum("c,nchw->nhw", torch.tensor(LUMA, dtype=torch.float64), images.double().cpu())
    luma = luma - luma.mean((1, 2), keepdim=True)
    window = torch.outer(*(torch.hann_window(n, periodic=True, dtype=torch.float64) for n in (height, width)))
    power = torch.fft.fft2(luma * window).abs().square() / window.square().sum()
    radius = torch.cartesian_prod(torch.fft.fftfreq(height), torch.fft.fftfreq(width)).double().norm(dim=1)
    edges = torch.linspace(0, 0.5, bins + 1, dtype=torch.float64)
    ring = torch.bucketize(radius, edges) - 1
    inside = (ring >= 0) & (ring < bins)
    counts = torch.bincount(ring[inside], minlength=bins)
    sums = torch.zeros(len(images), bins, dtype=torch.float64)
    sums.index_add_(1, ring[inside], power.flatten(1)[:, inside])
    return (edges[:-1] + edges[1:]) / 2, sums / counts.clamp(min=1)


def fine_power(frequencies: Tensor, power: Tensor) -> Tensor:
    """Mean power over the rings from :data:`FINE` on: (bins,) and (..., bins) to (...)."""
    return power[..., frequencies >= FINE].mean(-1)
