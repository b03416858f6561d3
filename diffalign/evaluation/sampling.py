"""``diffalign sample``: draw images of a model for a list of prompts, into a folder, resumable.

Every image is a function of (model, prompt, seed) and is what plain diffusers draws with
``torch.Generator("cpu").manual_seed(seed)``. Images are drawn in fixed batches, cut from the list of all cases,
whatever has been drawn before and however many processes share the work; so an interrupted run that goes on gives the
images of an uninterrupted one, bit for bit. Another ``batch_size`` gives the same images up to the rounding of the
model's arithmetic (on a CPU in float32: single levels of 255, in fewer than one value of a thousand).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm

from diffalign import __version__
from diffalign.config import field
from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import UserError
from diffalign.evaluation.draw import is_flat, iterate_images, sample_images, warn_of_flat
from diffalign.evaluation.folder import Case, SampleFolder
from diffalign.evaluation.models import ModelSpec, applied, identity
from diffalign.pipelines import load_family
from diffalign.pipelines.base import Family
from diffalign.pipelines.schedulers import make_scheduler

__all__ = ["Case", "DrawConfig", "Drawer", "ModelSpec", "SampleConfig", "SampleFolder", "plan", "run_sample"]
__all__ += ["sample_images"]

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")
SEED_STRIDE = 100_003
"""Distance of the seeds of one prompt's images where no seeds are listed."""


@dataclass(kw_only=True)
class DrawConfig:
    """What to draw and how."""

    pretrained_model_name_or_path: str = field(help="Pipeline folder, hub id, or a bundled name such as shapes-sdxl.")
    revision: str | None = field(None, help="Revision of the model on the hub.")
    variant: str | None = field(None, help="Weight file variant of the model, such as fp16.")
    pretrained_vae_model_name_or_path: str | None = field(None, help="Another VAE to use, such as an fp16-safe one.")
    output_dir: str = field(help="Folder for the images and their list.")
    overwrite_output_dir: bool = field(False, help="Draw anew what an earlier run left in output_dir.")

    prompts: list[str] | None = field(None, help="Prompts, as words of the command line.")
    prompts_file: str | None = field(None, help="Text file (a prompt a line), JSONL file, or shapes-heldout.")
    max_prompts: int | None = field(None, help="Use only the first so many prompts.")
    seeds: list[int] | None = field(None, help="Draw every prompt with each of these seeds.")
    seed: int = field(0, help="Where no seeds are listed: start of the seeds, which then differ for every image.")
    num_images_per_prompt: int = field(1, help="Where no seeds are listed: images for each prompt.")

    num_inference_steps: int = field(30, help="Denoising steps.")
    guidance_scale: float = field(5.0, help="Classifier-free guidance; 1 for none.")
    negative_prompt: str | None = field(None, help="Negative prompt, for all.")
    scheduler: str | None = field(
        None, help="Sampler: ddim, euler, dpm++, lcm, lcm:strength=0.8, ... Default: the model's own."
    )
    height: int | None = field(None, help="Height in pixels. Default: the model's own.")
    width: int | None = field(None, help="Width in pixels. Default: the model's own.")
    batch_size: int = field(4, help="Images drawn at once.")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = field(
        "auto", help="Type of the weights: bf16 or fp16 on a GPU, float32 on a CPU."
    )
    device: str | None = field(None, help="Device, such as cuda:1 or cpu. Default: the best there is.")

    def __post_init__(self) -> None:
        for name in ("num_images_per_prompt", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0 or any(seed < 0 for seed in self.seeds or []):
            raise UserError("seeds must be 0 or more")
        if self.prompts and self.prompts_file:
            raise UserError("give either prompts or prompts_file, not both")


@dataclass(kw_only=True)
class SampleConfig(DrawConfig):
    """Draw images of one model for a list of prompts."""

    lora: list[str] = field([], help="LoRAs, each PATH or PATH@SCALE; or the folder of a fine-tuned denoiser.")
    steps: list[int] | None = field(
        None, help="Draw with each of these numbers of denoising steps, into a folder steps-N for each."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and (min(self.steps, default=0) < 1 or len(set(self.steps)) < len(self.steps)):
            raise UserError(f"steps must be different numbers of at least 1, got {self.steps}")

    def spec(self) -> ModelSpec:
        """The model that is drawn."""
        return ModelSpec.from_parts(self.lora or ["base"])


def plan(
    prompts: Sequence[str], *, seeds: Sequence[int] | None = None, seed: int = 0, num_images_per_prompt: int = 1
) -> list[Case]:
    """The images to draw: every prompt with each of ``seeds``, or with seeds that no two images share.

    Without ``seeds``, image k of prompt i has seed ``seed + i + 100003 k``: if prompts shared initial noise, their
    scores would depend on each other.

    Raises:
        UserError: a seed is listed twice.
    """
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise UserError(f"a seed is listed twice: {list(seeds)}")
    return [
        Case(index, prompt, value)
        for index, prompt in enumerate(prompts)
        for value in (
            seeds if seeds is not None else [seed + index + SEED_STRIDE * k for k in range(num_images_per_prompt)]
        )
    ]


def prompts_of(config: DrawConfig) -> list[Prompt]:
    """The prompts that a config names, with their metadata.

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    source = config.prompts or config.prompts_file
    if not source:
        raise UserError(
            "nothing to draw: give --prompts 'a prompt' ... or --prompts_file FILE, such as diffalign-small or "
            "partiprompts:PLACE"
        )
    for prompt in config.prompts or []:
        # Training's prompts take a file; here its name would be drawn.
        if prompt.endswith((".txt", ".jsonl")) and os.path.isfile(prompt):
            raise UserError(
                f"--prompts {prompt} is a file, and would be drawn as a prompt: use --prompts_file {prompt}"
            )
    return read_prompts(source, limit=config.max_prompts)


def cases_of(config: DrawConfig) -> list[Case]:
    """The images that a config asks for. Errors as of :func:`prompts_of`."""
    prompts = [prompt.text for prompt in prompts_of(config)]
    return plan(prompts, seeds=config.seeds, seed=config.seed, num_images_per_prompt=config.num_images_per_prompt)


def run_sample(config: SampleConfig) -> list[SampleFolder]:
    """Draw what is missing of the images that a config asks for, and return their folders: one each of ``steps``.

    Raises:
        UserError: a model, prompt file or setting is wrong, or a folder holds other images. Nothing is drawn then.
    """
    spec, root, cases, drawer = config.spec(), Path(config.output_dir), cases_of(config), Drawer(config)
    places = [(spec, root)]
    if config.steps is not None:
        places = [(replace(spec, steps=count), root / f"steps-{count}") for count in config.steps]
    folders = [drawer.draw(model, cases, path) for model, path in places]
    if PartialState().is_main_process:
        for folder in folders:
            print(f"{len(folder.rows)} images in {folder.path}")
    return folders


class Drawer:
    """Draws models into folders, one after the other. Models that share a pipeline load it once, when first needed."""

    def __init__(self, config: DrawConfig) -> None:
        self.config = config
        self.state = PartialState(cpu=config.device == "cpu")
        self.device = torch.device(config.device) if config.device else self.state.device
        self.dtype = _dtype(config.mixed_precision, self.device)
        self._family: Family | None = None
        self._pipe: DiffusionPipeline | None = None
        self._sampler: str | None = None

    def draw_all(self, specs: Sequence[ModelSpec], cases: Sequence[Case], paths: Sequence[Path]) -> list[SampleFolder]:
        """Draw what is missing of ``cases`` by each model in its folder, with one bar for all of it."""
        total = len(specs) * len(list(itertools.chain(*self._share(cases))))
        several = f"{self.state.num_processes} processes, each " if self.state.num_processes > 1 else ""
        with tqdm(total=total, unit="image", disable=not self.state.is_main_process) as bar:
            folders = []
            for number, (spec, path) in enumerate(zip(specs, paths, strict=True), 1):
                bar.set_description(f"{several}{number} of {len(specs)}: {spec.name}")
                folders.append(self.draw(spec, cases, path, bar))
        return folders

    def draw(self, spec: ModelSpec, cases: Sequence[Case], path: Path, bar: tqdm[Any] | None = None) -> SampleFolder:
        """Draw what is missing of ``cases`` in the folder ``path``, with this process's share of the work.

        Args:
            bar: of a longer work that this is part of.

        Raises:
            UserError: see :func:`run_sample`.
        """
        folder = SampleFolder(path, self._settings(spec), self.state.process_index)
        folder.check(cases, overwrite=self.config.overwrite_output_dir)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            folder.prepare(overwrite=self.config.overwrite_output_dir)
        self.state.wait_for_everyone()
        folder.load()
        self._draw_missing(spec, cases, folder, bar)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            folder.finish()
        self.state.wait_for_everyone()
        folder.load()
        wanted = {case.file for case in cases}
        flat = sum(row["flat"] for file, row in folder.rows.items() if file in wanted)
        if self.state.is_main_process:
            warn_of_flat(flat, len(wanted))
        return folder

    def _share(self, cases: Sequence[Case]) -> list[Sequence[Case]]:
        """The batches of this process."""
        size = self.config.batch_size
        batches = [cases[start : start + size] for start in range(0, len(cases), size)]
        return batches[self.state.process_index :: self.state.num_processes]

    def _draw_missing(
        self, spec: ModelSpec, cases: Sequence[Case], folder: SampleFolder, bar: tqdm[Any] | None
    ) -> None:
        batches = self._share(cases)
        unfinished = [batch for batch in batches if any(case.file not in folder.rows for case in batch)]
        total = sum(map(len, batches))
        todo = sum(case.file not in folder.rows for batch in unfinished for case in batch)
        if bar is not None and not bar.disable:
            # What was there already says nothing of how long the rest takes.
            bar.initial += total - todo
            bar.update(total - todo)
        if not unfinished:
            return
        extra = self._row(spec)
        own = tqdm(
            total=total, initial=total - todo, unit="image", desc=spec.name,
            disable=bar is not None or not self.state.is_main_process,
        )  # fmt: skip
        with own, applied(self._pipeline(spec), spec):
            for batch in unfinished:
                for case, image in zip(batch, self._images(spec, batch), strict=True):
                    if case.file not in folder.rows:
                        folder.add(case, image, {**extra, "flat": is_flat(image)})
                        (own if bar is None else bar).update()

    def release(self) -> None:
        """Let the pipeline go, to make room for what judges its images."""
        self._family = self._pipe = None
        free_memory()

    def _images(self, spec: ModelSpec, batch: Sequence[Case]) -> Iterator[Any]:
        return iterate_images(
            self._pipeline(spec),
            [case.prompt for case in batch],
            [case.seed for case in batch],
            num_inference_steps=self._steps(spec),
            guidance_scale=self._guidance(spec),
            batch_size=self.config.batch_size,
            height=self.config.height,
            width=self.config.width,
            negative_prompt=self.config.negative_prompt,
        )

    def _load(self, spec: ModelSpec) -> Family:
        """The family of the model's pipeline; the one before it is let go."""
        path = spec.path or self.config.pretrained_model_name_or_path
        if self._family is None or self._family.path != path:
            own = spec.path is None
            self._pipe = None
            self._family = load_family(
                path,
                revision=self.config.revision if own else None,
                variant=self.config.variant if own else None,
                vae=self.config.pretrained_vae_model_name_or_path,
                dtype=self.dtype,
                device=self.device,
            )
            side = self._family.default_resolution
            self._family.latent_shape(self.config.height or side, self.config.width or side)
        return self._family

    def _pipeline(self, spec: ModelSpec) -> DiffusionPipeline:
        family = self._load(spec)
        if self._pipe is None or self._sampler != self._scheduler(spec):
            self._sampler = self._scheduler(spec)
            self._pipe = family.pipeline(scheduler=self._sampler)
        return self._pipe

    def _settings(self, spec: ModelSpec) -> dict[str, Any]:
        """Everything that an image depends on beside its prompt and seed."""
        config, family, scheduler = self.config, self._load(spec), self._scheduler(spec)
        if scheduler:
            make_scheduler(scheduler, {})
        return {
            "model": identity(spec, family.folder),
            "vae": config.pretrained_vae_model_name_or_path,
            "variant": family.variant,
            "num_inference_steps": self._steps(spec),
            "guidance_scale": self._guidance(spec),
            "negative_prompt": config.negative_prompt,
            "scheduler": scheduler,
            "height": config.height or family.default_resolution,
            "width": config.width or family.default_resolution,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _row(self, spec: ModelSpec) -> dict[str, Any]:
        """What each row of ``samples.jsonl`` says beside the prompt and the seed."""
        settings = self._settings(spec)
        del settings["model"], settings["vae"], settings["variant"]
        return {
            "model": spec.name,
            "path": spec.path or self.config.pretrained_model_name_or_path,
            "loras": [list(lora) for lora in spec.loras],
            "denoiser": spec.denoiser,
            **settings,
            "scheduler": type(self._pipeline(spec).scheduler).__name__,
            "versions": versions(),
        }

    def _steps(self, spec: ModelSpec) -> int:
        return self.config.num_inference_steps if spec.steps is None else spec.steps

    def _guidance(self, spec: ModelSpec) -> float:
        return self.config.guidance_scale if spec.guidance is None else spec.guidance

    def _scheduler(self, spec: ModelSpec) -> str | None:
        return self.config.scheduler if spec.scheduler is None else spec.scheduler


def versions() -> dict[str, str]:
    """Versions of what decides the pixels of an image."""
    return {
        "diffalign": __version__,
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }


def slug(name: str) -> str:
    """A model's name as the name of a folder."""
    return re.sub(r"[^\w.@+-]+", "_", name).strip("._") or "model"


def _dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    named = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if mixed_precision in named:
        return named[mixed_precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
