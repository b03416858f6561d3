"""The image side of every latent-diffusion family: a KL autoencoder that does not give black images.

SDXL's VAE overflows in float16. Its config says so (``force_upcast``), and diffusers upcasts it for each decode. Here
the VAE is *loaded* in a dtype that is safe, once, and stays in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.errors import UserError


def safe_dtype(config: Mapping[str, Any], dtype: torch.dtype, asked: torch.dtype | None = None) -> torch.dtype:
    """The dtype to load a VAE in.

    ``asked`` if given, else ``dtype`` where the VAE's config says ``force_upcast: false`` (as the "fp16-fix" VAEs do),
    else float32.

    Raises:
        UserError: float16 is asked of a VAE that overflows in it.
    """
    upcast = bool(config.get("force_upcast", True))
    if asked is torch.float16 and upcast:
        raise UserError(
            "this VAE overflows in float16 (its config has force_upcast) and would give black images. "
            "Ask for float32 or bfloat16, or name a replacement VAE that is safe in float16, "
            "such as vae='madebyollin/sdxl-vae-fp16-fix'."
        )
    if asked is not None:
        return asked
    return torch.float32 if upcast else dtype


def accept_any_dtype(vae: AutoencoderKL) -> AutoencoderKL:
    """Let ``vae.decode`` take latents of any float dtype, as the pipelines hand it those of the denoiser."""

    def cast(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].to(next(module.parameters()).dtype), *args[1:])

    (vae.post_quant_conv or vae.decoder).register_forward_pre_hook(cast)
    return vae


def _moments(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, scale), each broadcastable to (B, C, h, w), such that ``latents = (z - shift) * scale``."""
    config = vae.config
    scale = torch.tensor(config.scaling_factor, dtype=torch.float32, device=like.device)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (torch.tensor(value, device=like.device).float().view(1, -1, 1, 1) for value in (mean, std))
        return mean, scale / std
    shift = getattr(config, "shift_factor", None) or 0.0
    return torch.tensor(float(shift), device=like.device), scale


def encode(
    vae: AutoencoderKL,
    images: Tensor,
    *,
    posterior: Literal["mean", "sample"] = "mean",
    generators: Sequence[torch.Generator] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to scaled latents (B, C, h, w), float32, without gradient.

    Args:
        posterior: "mean", or "sample" to draw from the posterior with one CPU generator per image.
        chunk: how many images the VAE sees at once; None is all of them.
    """
    if posterior == "sample" and (generators is None or len(generators) != len(images)):
        raise ValueError("posterior='sample' needs one torch.Generator per image.")
    parts = []
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for part in images.split(chunk or max(len(images), 1)):
            parameters = vae.encode((part * 2 - 1).to(vae.device, vae.dtype)).latent_dist
            parts.append(torch.cat([parameters.mean, parameters.std], dim=1).float())
    mean, std = torch.cat(parts).chunk(2, dim=1)
    z = mean
    if posterior == "sample" and generators is not None:
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        z = mean + std * noise.to(mean.device)
    shift, scale = _moments(vae, z)
    return (z - shift) * scale


def decode(vae: AutoencoderKL, latents: Tensor, *, grad: bool = False, chunk: int | None = None) -> Tensor:
    """Scaled latents (B, C, h, w) to images (B, 3, H, W) in [0, 1], float32.

    Args:
        grad: keep the gradient with respect to ``latents``. The clamp to [0, 1] then passes it straight through, so
            that a pixel beyond the range is still pulled by a reward.
        chunk: how many latents the VAE sees at once; None is all of them. With ``grad``, each chunk is checkpointed
            and decoded once more in the backward pass, so that memory is that of one chunk.
    """

    def one(part: Tensor) -> Tensor:
        shift, scale = _moments(vae, part)
        with torch.autocast(part.device.type, enabled=False):
            z = part.to(vae.device).float() / scale + shift
            return vae.decode(z.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5

    with torch.set_grad_enabled(grad):
        if grad and chunk:
            parts = [checkpoint(one, part, use_reentrant=False) for part in latents.split(chunk)]
        else:
            parts = [one(part) for part in latents.split(chunk or max(len(latents), 1))]
        images = torch.cat(parts)
        return images + (images.clamp(0, 1) - images).detach() if grad else images.clamp(0, 1)
