"""LCD, latent consistency distillation: a student that draws in 1 to 8 steps what its teacher draws in 25 to 50.

Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378, and "LCM-LoRA", arXiv 2311.05556. The student learns
the consistency function f of :mod:`diffalign.diffusion.consistency`: from every point of the teacher's guided
trajectory to its end. With i uniform over the M timesteps tau_i of the solver's grid and w uniform in [w_min, w_max],

    t    = tau_i,  x_t = alpha_t x_0 + sigma_t epsilon
    x_t' = a step of DDIM by the teacher from x_t to t' = max(t - T/M, 0), guided by w (a guidance scale of w + 1)
    L    = E d( f(x_t, t), f_target(x_t', t') )

where the target has no gradient, d is Huber's distance, ``sqrt(diff^2 + c^2) - c``, or the squared one, and t' = 0
makes the target x_t' itself.

A LoRA: the teacher is the network with its adapters off, the target the network itself (with ``use_ema`` its EMA).
Full fine-tuning: the teacher is a frozen copy, the target an EMA of the student. There the student can be told w
(``unet_time_cond_proj_dim``), as in the first paper, and draws at any guidance scale; without, one w or the average
of them is baked in, and it is sampled without guidance. With ``initial_lora`` and ``reference: start`` the teacher is
a model that was aligned before.

What differs from the papers and from the scripts of diffusers, whose constants these are: Huber's distance is the
default, as their READMEs run it. Each image has its own i, w and noise, keyed by run and step. The embedding of
guidance starts at 0, as in the paper, so that the student starts as its teacher in both modes. A model of rectified
flow takes Euler steps on evenly spread times; this form is inferred, there being no script of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers import LCMScheduler
from torch import Tensor, nn

from diffalign.config import field
from diffalign.data.items import Items
from diffalign.diffusion.consistency import (
    Distance,
    SolverGrid,
    consistency_distance,
    consistency_function,
    guidance_embedding,
    solver_grid,
    solver_step,
)
from diffalign.diffusion.random import Key, keyed_uniform
from diffalign.errors import UserError
from diffalign.pipelines import Family
from diffalign.pipelines.schedulers import make_scheduler
from diffalign.training.images import ImageBatch, ImageBatches, ImageConfig, ImageTrainer, image_items
from diffalign.training.loop import Needs
from diffalign.training.rollout import Condition, Text, predict_both
from diffalign.training.validation import Sampling

TARGET = "target"
TEACHER_STEPS = 25
"""Steps that the teacher is drawn with beside the student."""
LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
"""What LCM-LoRA adapts: a new way to sample moves more than attention."""


def lcd_loss(student: Tensor, target: Tensor, kind: Distance = "huber", c: float = 1e-3) -> Tensor:
    """``d(f_student, f_target)`` of each image, (B,), without gradient to the target; its mean over B is the loss.

    Args:
        student, target: values of f, (B, C, h, w).
        kind, c: see :func:`diffalign.diffusion.consistency.consistency_distance`.
    """
    return consistency_distance(student, target.detach(), kind, c)


@dataclass(kw_only=True)
class LCDConfig(ImageConfig):
    """Settings of latent consistency distillation."""

    w_min: float = field(3.0, help="Least guidance of the teacher; w is a guidance scale minus 1.")
    w_max: float = field(15.0, help="Most guidance; each image draws its own between both. Equal: a fixed scale.")
    num_ddim_timesteps: int = field(50, help="Timesteps of the solver's grid; each step skips 1000 / this. LCM: 50.")
    timestep_scaling_factor: float = field(
        10.0, help="Factor on t in the boundary scalings. The sampler must have the same; published models have 10."
    )
    loss_type: Distance = field("huber", help="Distance of student and target: huber or l2.")
    huber_c: float = field(1e-3, help="Where Huber's distance turns from a square into an absolute value.")
    unet_time_cond_proj_dim: int | None = field(
        None,
        help="Tell the student its guidance by an embedding of this size, LCM: 256 (needs train_mode full). "
        "Default: guidance is baked in.",
    )
    ema_decay: float = field(
        0.95,
        help="Decay of the target, an EMA of the student: in full fine-tuning, and with use_ema of a LoRA. "
        "With use_ema an EMA of this decay is also what is saved.",
    )

    rank: int = field(64, help="Rank of the LoRA. LCM-LoRA: 64.")
    lora_targets: list[str] | None = field(
        LORA_TARGETS, help="Modules that get a LoRA; none for attention alone. Default: those of LCM-LoRA."
    )
    learning_rate: float = field(1e-4, help="Peak learning rate. LCM-LoRA: 1e-4; full fine-tuning: 1e-6.")

    validation_scheduler: str | None = field("lcm", help="Sampler of a validation image.")
    validation_inference_steps: int = field(4, help="Sampling steps of a validation image.")
    validation_guidance_scale: float = field(
        1.0,
        help="Guidance of a validation image, 1 to 2. Default for a student that is told its guidance: the middle of "
        "its range.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("w_min", self.w_min >= 0, "0 or more")
        if self.w_max < self.w_min:
            raise UserError(f"w_max {self.w_max:g} is below w_min {self.w_min:g}; make them equal for one fixed scale")
        self._require("num_ddim_timesteps", self.num_ddim_timesteps >= 1, "at least 1")
        for name in ("timestep_scaling_factor", "huber_c"):
            self._require(name, getattr(self, name) > 0, "above 0")
        dim = self.unet_time_cond_proj_dim
        self._require("unet_time_cond_proj_dim", dim is None or dim >= 4, "at least 4, or none")
        if dim is not None and self.train_mode == "lora":
            raise UserError(
                "unet_time_cond_proj_dim adds weights to the denoiser, which a LoRA does not hold: set train_mode "
                "full, or leave it out"
            )
        if dim is not None:
            self._choose_told_guidance()

    def _choose_told_guidance(self) -> None:
        if self.validation_guidance_scale == 1 and self.w_min > 0:
            self.validation_guidance_scale = self.middle_guidance_scale
        if not self.w_min <= self.validation_guidance_scale - 1 <= self.w_max:
            raise UserError(
                f"validation_guidance_scale {self.validation_guidance_scale:g} is none that the student is told of: "
                f"it learns {self.w_min + 1:g} to {self.w_max + 1:g} (w_min + 1 to w_max + 1)"
            )

    @property
    def middle_guidance_scale(self) -> float:
        """The teacher's, in the middle of the range."""
        return 1 + (self.w_min + self.w_max) / 2


@dataclass
class LCDBatch(ImageBatch):
    """B images at points of the solver's grid; :attr:`timesteps` are tau_i."""

    previous: Tensor
    """Where the solver's step ends, (B,)."""
    w: Tensor
    """Guidance of each image, (B,) float32; a guidance scale minus 1."""


class LCDBatches(ImageBatches):
    """Streams images with a solver step and a guidance of their own."""

    def __init__(
        self, items: Items, config: LCDConfig, family: Family, accelerator: Accelerator, grid: SolverGrid
    ) -> None:
        super().__init__(items, config, family, accelerator)
        self.grid, self.w_range = grid, (config.w_min, config.w_max)

    def make_batch(self, items: dict[str, Any], samples: list[Key]) -> LCDBatch:
        plain = super().make_batch(items, samples)
        seed, (low, high) = self.config.seed, self.w_range
        index = (keyed_uniform([(seed, "solver step", *s) for s in samples]).double() * len(self.grid)).long()
        w = low + (high - low) * keyed_uniform([(seed, "guidance", *s) for s in samples])
        own = {f.name: getattr(plain, f.name) for f in fields(plain)}
        own["timesteps"] = self.grid.timesteps[index].to(self.device)
        return LCDBatch(**own, previous=self.grid.previous[index].to(self.device), w=w.to(self.device))


@dataclass(frozen=True)
class Distilled:
    """What a batch of B images teaches."""

    losses: Tensor
    """Loss of each image, times its weight, (B,), with graph."""
    student: Tensor
    """The student's one-step prediction f(x_t, t), (B, C, h, w), with graph; scaled as the denoiser's latents."""
    target: Tensor
    """The target's f(x_t', t'), (B, C, h, w), detached."""
    latents: Tensor
    """Clean latents of the images, (B, C, h, w)."""
    timesteps: Tensor
    """t of each image, (B,)."""
    prompts: list[str]
    """What each image is conditioned on: its caption, or "" where the prompt was dropped."""


Distillation = TypeVar("Distillation", bound=LCDConfig)


class LCDTrainer(ImageTrainer[Distillation]):
    """Distils; a subclass may add to the loss what it makes of :class:`Distilled`."""

    method = "lcd"
    needs = Needs(reference=True)
    paper = """@article{luo2023latent,
  title={Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference},
  author={Luo, Simian and Tan, Yiqin and Huang, Longbo and Li, Jian and Zhao, Hang},
  journal={arXiv preprint arXiv:2310.04378},
  year={2023}
}"""

    def __init__(self, config: Distillation, family: Family | None = None) -> None:
        super().__init__(config, family)
        if config.train_mode == "full" or config.use_ema:
            self.policy.add_copy(TARGET)
        if config.unet_time_cond_proj_dim is not None:
            with self.policy.base() as teacher:
                # Or a pipeline would draw the teacher, too, by an embedding instead of by guidance.
                teacher.register_to_config(time_cond_proj_dim=None)  # type: ignore[operator]

    @classmethod
    def frozen_passes(cls, config: LCDConfig) -> int:
        return 3  # The teacher's two branches, and the target.

    @classmethod
    def slow_copies(cls, config: LCDConfig) -> int:
        return int(config.train_mode == "full" or config.use_ema)

    def make_batches(self) -> LCDBatches:
        config, family = self.config, self.family
        grid = solver_grid(family.noise_process, config.num_ddim_timesteps)
        # Before the text encoders are freed.
        with torch.no_grad():
            self.unconditional: Text = family.encode_unconditional()
        batches = LCDBatches(
            image_items(config, family, self.accelerator, "liked"), config, family, self.accelerator, grid
        )
        if config.unet_time_cond_proj_dim is not None:
            family.add_guidance_embedding(config.unet_time_cond_proj_dim)
        return batches

    def compute_loss(self, batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
        distilled = self.distil(batch)
        return distilled.losses.mean(), self.report(distilled)

    def distil(self, batch: ImageBatch) -> Distilled:
        """One step of distillation on a batch; the loss of a subclass may build on all that it returns."""
        assert isinstance(batch, LCDBatch)
        x_t = self.family.noise_process.add_noise(batch.latents, batch.noise, batch.timesteps)
        # The student comes last: until its backward pass no adapter may be switched and no weights swapped.
        x_previous = self._solve(batch, x_t)
        with self._target() as network:
            target = self._f(network, batch, x_previous, batch.previous)
        student = self._f(self.policy.denoiser, batch, x_t, batch.timesteps)
        return Distilled(
            losses=batch.weight * lcd_loss(student, target, self.config.loss_type, self.config.huber_c),
            student=student,
            target=target,
            latents=batch.latents,
            timesteps=batch.timesteps,
            prompts=batch.prompts,
        )

    def report(self, distilled: Distilled) -> dict[str, Tensor]:
        """Metrics of the distillation."""
        losses, half = distilled.losses.detach(), self.family.noise_process.num_train_timesteps / 2
        noisy = (distilled.timesteps >= half).float()
        return {
            "distillation": losses.mean(),
            "distillation_noisy": torch.stack([(losses * noisy).sum(), noisy.sum()]),
            "distillation_clear": torch.stack([(losses * (1 - noisy)).sum(), (1 - noisy).sum()]),
            "distance_to_image": (distilled.student.detach() - distilled.latents).square().mean(),
        }

    def _solve(self, batch: LCDBatch, x_t: Tensor) -> Tensor:
        """x_t', a step further on the teacher's guided trajectory."""
        with self.policy.evaluating(), self.policy.reference() as teacher:
            given = Condition(batch.text(), self.unconditional, sizes=batch.sizes)
            uncond, cond = predict_both(self.family, teacher, x_t, batch.timesteps, given)
        return solver_step(self.family.noise_process, cond, uncond, batch.w, x_t, batch.timesteps, batch.previous)

    @contextmanager
    def _target(self) -> Iterator[nn.Module]:
        """The network of the target, without gradients: an EMA of the student, or the student as it is."""
        with torch.no_grad(), self.policy.evaluating():
            if TARGET not in self.policy.copies:
                yield self.policy.modules[self.family.denoiser_part]
                return
            with self.policy.copy_weights(TARGET) as network:
                yield network

    def _f(self, network: nn.Module, batch: LCDBatch, x: Tensor, t: Tensor) -> Tensor:
        dim = self.config.unet_time_cond_proj_dim
        told = None if dim is None else guidance_embedding(batch.w, dim)
        pred = self.family.predict(network, x, t, batch.text(), batch.sizes, told)
        return consistency_function(self.family.noise_process, pred, x, t, self.config.timestep_scaling_factor)

    def after_update(self) -> None:
        super().after_update()
        if TARGET in self.policy.copies:
            self.policy.update_copy(TARGET, self.config.ema_decay)

    def sampling(self) -> Sampling:
        plain = Sampling.of(self.config)
        if plain.scheduler is None or type(make_scheduler(plain.scheduler, {})) is not LCMScheduler:
            return plain
        own = {
            "timestep_scaling": self.config.timestep_scaling_factor,
            "original_inference_steps": self.config.num_ddim_timesteps,
        }
        usual = inspect.signature(LCMScheduler.__init__).parameters
        return replace(plain, options={name: own[name] for name in own if own[name] != usual[name].default})

    def base_sampling(self) -> Sampling:
        """The teacher's, at the steps that it is meant to be drawn with."""
        return Sampling(TEACHER_STEPS, self.config.middle_guidance_scale)

    def facts(self) -> Mapping[str, str]:
        config = self.config
        low, high = config.w_min + 1, config.w_max + 1
        scale = f"guidance scale {low:g}" if low == high else f"guidance scales {low:g} to {high:g}"
        told = "the student is told which" if config.unet_time_cond_proj_dim else "baked into the student"
        target = f"EMA of the student, decay {config.ema_decay:g}" if TARGET in self.policy.copies else "the student"
        return {
            "teacher": f"{scale}, {told}; {config.num_ddim_timesteps} timesteps",
            "target": target,
            "distance": config.loss_type + (f", c {config.huber_c:g}" if config.loss_type == "huber" else ""),
        }
