"""Validation images: the policy's beside the base model's, same prompts, same seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from torch import nn

from diffalign.data.encoding import images_at_once
from diffalign.evaluation.draw import is_flat, sample_images, warn_of_flat
from diffalign.evaluation.page import make_grid
from diffalign.pipelines import Family
from diffalign.pipelines.schedulers import make_scheduler
from diffalign.training.config import TrainingConfig
from diffalign.training.policy import Policy


@dataclass(frozen=True)
class Sampling:
    """How a model is drawn.

    Attributes:
        num_inference_steps, guidance_scale: as the pipelines of diffusers take them.
        scheduler: a name that :func:`diffalign.pipelines.schedulers.make_scheduler` knows; None for the model's own.
        options: arguments of the scheduler that are not the checkpoint's.
    """

    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainingConfig) -> Sampling:
        """What the ``validation_`` settings say."""
        return cls(config.validation_inference_steps, config.validation_guidance_scale, config.validation_scheduler)


def draw_images(
    family: Family,
    denoiser: nn.Module,
    sampling: Sampling,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
) -> list[Image.Image]:
    """Draw through the real pipeline of a family, with a denoiser in the place of its own.

    Parts that were not loaded are freed again. The rest as of :func:`diffalign.evaluation.draw.sample_images`.
    """
    kept = family.loaded
    pipe = family.pipeline()
    pipe.register_modules(**{family.denoiser_part: denoiser})
    if sampling.scheduler:
        pipe.scheduler = make_scheduler(sampling.scheduler, family.scheduler_config, **sampling.options)
    side = family.default_resolution
    with _sliced(pipe.vae, batch_size > images_at_once(side, side)):
        images = sample_images(
            pipe,
            prompts,
            seeds,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            batch_size=batch_size,
        )
    del pipe
    family.free(*(family.loaded - kept))
    return images


@contextmanager
def _sliced(vae: Any, sliced: bool) -> Iterator[None]:
    """Inside, the VAE decodes images one by one if asked: decoding must not need more memory than training."""
    if not sliced:
        yield
        return
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.disable_slicing()


class Validation:
    """Draws ``validation_prompts`` during training, spread over the processes, into ``samples/``.

    The base model's images are drawn once, with the reference, and kept in ``samples/base``; each later sheet
    ``samples/step-N.png`` shows them beside the policy's (its EMA's, where there is one).

    Args:
        config, policy, accelerator, output_dir: of the run.
        sampling: how the policy is drawn.
        base_sampling: how the base model is.
    """

    def __init__(
        self,
        config: TrainingConfig,
        policy: Policy,
        accelerator: Accelerator,
        output_dir: Path,
        sampling: Sampling,
        base_sampling: Sampling,
    ) -> None:
        self.config, self.policy, self.accelerator = config, policy, accelerator
        self.sampling, self.base_sampling = sampling, base_sampling
        self.folder = output_dir / "samples"
        prompts = config.validation_prompts or []
        seeds = range(config.seed, config.seed + config.num_validation_images)
        self.cases = [(prompt, seed) for prompt in prompts for seed in seeds]

    def due(self, step: int, total: int) -> bool:
        """Whether to draw after ``step`` steps of ``total``: at 0, at every interval, and at the end."""
        return bool(self.cases) and (step % self.config.validation_steps == 0 or step == total)

    def run(self, step: int) -> Path | None:
        """Draw, and return the sheet's path (on the main process; None where there is nothing to draw)."""
        if not self.cases:
            return None
        base = self.folder / "base"
        if not all(self._file(base, index).exists() for index in range(len(self.cases))):
            self.accelerator.wait_for_everyone()
            with self.policy.base() as denoiser:
                self._draw(base, denoiser, self.base_sampling)
        with self.policy.ema_weights():
            self._draw(self.folder / f"step-{step}", self.policy.family.denoiser, self.sampling)
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return None
        return self._sheet(step)

    def _draw(self, folder: Path, denoiser: nn.Module, sampling: Sampling) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        processes = self.accelerator.num_processes
        own = range(self.accelerator.process_index, len(self.cases), processes)
        mine = list(own)
        if self.policy.sharded:
            # Weights are brought together in every pass, by all: who has fewer images draws the last one too.
            mine += [len(self.cases) - 1] * (-(-len(self.cases) // processes) - len(own))
        # Otherwise a process without cases takes part in nothing collective here, so it may skip the loading.
        if mine:
            with self.accelerator.autocast():
                images = draw_images(
                    self.policy.family,
                    denoiser,
                    sampling,
                    [self.cases[i][0] for i in mine],
                    [self.cases[i][1] for i in mine],
                    self.config.train_batch_size,
                )
            for index, image in zip(own, images, strict=False):
                image.save(self._file(folder, index))
            warn_of_flat(sum(is_flat(image) for image in images), len(images))
        self.accelerator.wait_for_everyone()

    def _sheet(self, step: int) -> Path:
        columns = ["base", f"step {step}"]
        if self.base_sampling != self.sampling:
            drawn = (self.base_sampling, self.sampling)
            columns = [f"{name}, drawn in {s.num_inference_steps}" for name, s in zip(columns, drawn, strict=True)]
        folders = [self.folder / "base", self.folder / f"step-{step}"]
        rows = [[Image.open(self._file(folder, i)) for folder in folders] for i in range(len(self.cases))]
        labels = [f"{prompt} (seed {seed})" for prompt, seed in self.cases]
        path = self.folder / f"step-{step}.png"
        make_grid(rows, labels, columns).save(path)
        return path

    def _file(self, folder: Path, index: int) -> Path:
        return folder / f"{index:04d}.png"
