"""Draw images with a diffusers pipeline so that each is a function of (model, prompt, seed).

The initial noise of an image comes from its own CPU generator, ``torch.Generator("cpu").manual_seed(seed)``, as anyone
would write it against plain diffusers; which images happen to share its batch does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign.errors import UserError

logger = logging.getLogger(__name__)


def sample_images(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 30,
    guidance_scale: float = 5.0,
    batch_size: int = 4,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
) -> list[Image.Image]:
    """Draw image i from ``prompts[i]`` and ``seeds[i]``. See :func:`iterate_images`, whose list this is."""
    return list(
        iterate_images(
            pipe,
            prompts,
            seeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
        )
    )


def iterate_images(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 30,
    guidance_scale: float = 5.0,
    batch_size: int = 4,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
) -> Iterator[Image.Image]:
    """Draw images, a batch at a time, and yield them in order as RGB.

    The models of the pipeline are in evaluation mode while they draw (LoRA dropout off) and get their modes back.
    No global random state is read or changed.

    Args:
        pipe: a text-to-image pipeline of diffusers.
        prompts: one for each image.
        seeds: one for each image, >= 0.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 switches it off.
        batch_size: images drawn at once; changes speed and memory, never what is drawn, up to the rounding of the
            model's arithmetic in batches of another size.
        height, width: in pixels; None for the pipeline's own.
        negative_prompt: one text for all.

    Raises:
        UserError: prompts and seeds differ in number, or a setting is out of range.
    """
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts but {len(seeds)} seeds: each image needs one of each")
    if batch_size < 1 or num_inference_steps < 1:
        raise UserError(
            f"batch_size and num_inference_steps must be at least 1, got {batch_size} and {num_inference_steps}"
        )
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator("cpu").manual_seed(int(s)) for s in seeds[start : start + batch_size]]
        negative = None if negative_prompt is None else [negative_prompt] * len(batch)
        with torch.no_grad(), _quietly_evaluating(pipe):
            output = pipe(prompt=batch, negative_prompt=negative, generator=generators, output_type="pil", **settings)
        yield from (image.convert("RGB") for image in output.images)


def is_flat(image: Image.Image) -> bool:
    """Whether an image is one colour all over: what a broken VAE (fp16 overflow) or a safety checker returns."""
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == pixels[0, 0]).all())


def warn_of_flat(count: int, total: int) -> None:
    """Say once that ``count`` of ``total`` images are flat, and what usually causes it. Silent for none."""
    if count:
        logger.warning(
            "%d of %d images are one flat colour. Usual causes: a VAE that overflows in fp16 (use bf16 or fp32, or a "
            "VAE made for fp16), weights that are not finite, or the safety checker of a Stable Diffusion folder.",
            count,
            total,
        )


@contextmanager
def _quietly_evaluating(pipe: DiffusionPipeline) -> Iterator[None]:
    """Evaluation mode and no progress bar inside; every module's mode and the bar's settings restored after."""
    training = [
        part
        for component in pipe.components.values()
        if isinstance(component, torch.nn.Module)
        for part in component.modules()
        if part.training
    ]
    bar = getattr(pipe, "_progress_bar_config", {})
    for part in training:
        part.training = False
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**bar)
        for part in training:
            part.training = True
