"""Judging models of the shapes world: same prompts, same seeds, by the checker and by the simulated annotators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from diffalign.assets import resolve
from diffalign.evaluation.draw import iterate_images
from diffalign.evaluation.stats import WinRate, win_rate
from diffalign.pipelines.schedulers import make_scheduler
from diffalign.shapes import annotators, checker
from diffalign.shapes.scene import EVALUATION_SEED, reported_captions

STEPS = 25
GUIDANCE = 5.0


def heldout_prompts(count: int, seed: int = EVALUATION_SEED) -> list[str]:
    """``count`` captions that neither the base model nor the preference pairs were trained on."""
    return reported_captions(count, seed)


def draw(
    prompts: Sequence[str],
    *,
    base: str = "shapes-sdxl",
    lora: Path | None = None,
    lora_scale: float = 1.0,
    scheduler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[Image.Image]:
    """Draw one image for each prompt through plain diffusers; image i has seed i.

    Args:
        lora: folder of a LoRA in the diffusers layout; None draws the base model.
        scheduler: a name of :mod:`diffalign.pipelines.schedulers`, with options; None is the model's own.
        steps, guidance: by default :data:`STEPS` and :data:`GUIDANCE`.
        progress: label of a progress bar.
    """
    from tqdm.auto import tqdm

    pipe = DiffusionPipeline.from_pretrained(resolve(base))
    if scheduler is not None:
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler.config)
    if lora is not None:
        pipe.load_lora_weights(str(lora), adapter_name="aligned")
        # Folded into the weights: the same model, an eighth faster here.
        pipe.fuse_lora(lora_scale=lora_scale)
    images = iterate_images(
        pipe,
        list(prompts),
        list(range(len(prompts))),
        num_inference_steps=STEPS if steps is None else steps,
        guidance_scale=GUIDANCE if guidance is None else guidance,
        batch_size=batch_size,
    )
    return list(tqdm(images, total=len(prompts), desc=progress, unit="image", disable=progress is None))


@dataclass(frozen=True)
class Judgement:
    """Scores of N images: the checker's share of facts in [0, 1], and the annotators' mean utility."""

    checker: NDArray[np.float64]
    annotator: NDArray[np.float64]


def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
    """Score images against their prompts by both judges."""
    utilities = [annotators.utility(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return Judgement(checker.scores(images, prompts), np.array(utilities))


def compare(aligned: Judgement, base: Judgement) -> dict[str, WinRate]:
    """Win rates of the aligned model against the base, image by image, by each judge."""
    return {
        "checker": win_rate(aligned.checker, base.checker),
        "annotator": win_rate(aligned.annotator, base.annotator),
    }
