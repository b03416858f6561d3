"""Stage 1: the VAE. Everything else is limited by what its reconstructions keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor

from diffalign.diffusion.random import keyed_generator
from diffalign.shapes import scene
from diffalign.shapes.building.models import build_vae
from diffalign.shapes.building.stage import Schedule, train_stage

POOL = 16384
KL_WEIGHT = 1e-4
SCHEDULE = Schedule(steps=9000, learning_rate=3e-3, ema_decay=0.998)


def render_clutter(rng: np.random.Generator) -> Image.Image:
    """Three to eight shapes of any colour anywhere: teaches every colour and edge in few steps."""
    k = 4
    canvas = Image.new("RGB", (scene.SIZE * k, scene.SIZE * k), tuple(int(v) for v in rng.integers(0, 256, 3)))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(3, 9))):
        x, y = rng.uniform(0, scene.SIZE * k, 2)
        corners = scene.outline(str(rng.choice(scene.SHAPES)), float(x), float(y), float(rng.uniform(5, 18)) * k)
        pen.polygon(corners, fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return canvas.resize((scene.SIZE, scene.SIZE), Image.Resampling.BOX)


def render_pool(count: int, seed: int) -> Tensor:
    """Pictures to train on, a third of them clutter: (count, 3, 64, 64) uint8."""
    rng = np.random.default_rng([seed, 1])
    pictures = [
        render_clutter(rng) if index % 3 == 0 else scene.render(scene.complete(scene.sample_spec(rng), rng))
        for index in range(count)
    ]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to VAE pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode and decode (N, 3, 64, 64) uint8 pictures through the posterior mean."""
    with torch.no_grad():
        output = torch.cat([vae(to_pixels(part)).sample for part in images.to(vae.device).split(64)])
    return ((output.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def standardise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold the latents' mean and deviation per channel into the 1x1 convolutions around them.

    Afterwards latents have mean 0 and deviation 1 in each channel and ``scaling_factor`` is 1.
    """
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_pixels(part)).latent_dist.mean for part in images.split(64)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        channels = len(mean)
        quant, post = vae.quant_conv, vae.post_quant_conv
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


def train_vae(folder: Path, work: Path, seed: int, device: str, schedule: Schedule = SCHEDULE) -> AutoencoderKL:
    """Train and save the VAE into ``folder``; samples and state go to ``work``. Returns it in eval mode."""
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder).to(device).eval()
    torch.manual_seed(seed)
    pool = render_pool(POOL, seed).to(device)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    held, pool = pool[:512], pool[512:]

    def loss_of_step(step: int) -> Tensor:
        generator = keyed_generator(seed, "vae", step)
        rows = torch.randint(len(pool), (16,), generator=generator)
        x = to_pixels(pool[rows.to(device)]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + 4 * error.square().mean() + KL_WEIGHT * kl

    def on_sample(step: int) -> None:
        rows = torch.cat([held[:16], reconstruct(vae, held[:16]).to(device)])
        save_sheet(rows, work / f"vae-{step:06d}.png", columns=16)

    train_stage("vae", vae, loss_of_step, schedule, work, on_sample)
    vae = vae.to(memory_format=torch.contiguous_format)
    standardise_latents(vae, held)
    vae.save_pretrained(folder)
    return vae


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Write (N, 3, 64, 64) uint8 pictures as one contact sheet."""
    rows = images.cpu().permute(0, 2, 3, 1).numpy()
    lines = [np.concatenate(list(rows[k : k + columns]), axis=1) for k in range(0, len(rows), columns)]
    Image.fromarray(np.concatenate(lines, axis=0)).save(path)
