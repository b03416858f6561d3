"""The online route: prompts -> rollout -> rewards -> advantages -> objective, on the same loop as everything else.

A run is a sequence of rollouts. Each draws images with the policy as it is, scores them, turns scores into
advantages, and is then trained on for ``num_updates_per_rollout x num_inner_epochs`` optimiser steps. Rollout n is a
function of the weights and n alone, so a run resumes exactly from any checkpoint between two rollouts; one that is
killed while it draws, draws again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from diffalign.data.prompts import Prompt
from diffalign.diffusion.random import Key, keyed_permutation
from diffalign.errors import DiffalignError, UserError
from diffalign.estimation.work import Work
from diffalign.pipelines import Family
from diffalign.training.advantages import PromptStatTracker
from diffalign.training.groups import Arithmetic, Draws, GroupOrder, trained_steps
from diffalign.training.loop import Batches, Plan, StopAsked
from diffalign.training.online_config import OnlineConfig
from diffalign.training.processes import waiting
from diffalign.training.prompted import PromptNeeds, PromptTrainer
from diffalign.training.rollout import Condition, Trajectory, rollout, select_text
from diffalign.training.scoring import RolloutScorer, Scored
from diffalign.training.sharding import check_launch
from diffalign.training.work import online_work

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=OnlineConfig)
_TRACKER = "prompt_statistics.json"
_RATIO_BOUND = 1e-4


@dataclass(frozen=True)
class OnlineNeeds(PromptNeeds):
    """What an online objective needs of a rollout."""

    steps: bool = False
    """Latents and log-probabilities of the sampling steps; without, the clean latents alone."""


@dataclass(frozen=True)
class OnlineBatch:
    """B images of a rollout, on the device.

    Attributes:
        given: what they were drawn for.
        latents: clean latents, (B, C, h, w) float32.
        advantages, weight: (B,) float32; the weight is 0 for images that do not count, and has mean 1 over a rollout.
        rewards: combined reward, (B,) float32; NaN where an image has none.
        use: number of the rollout, of the inner epoch, and of this pass over the images.
        samples: what tells each image and use of it apart, for keyed randomness.
        index: which sampling step is trained, int64 (B,), on the CPU.
        x, x_next: latents before and after that step, (B, C, h, w); empty where the objective needs none.
        log_probs: of that step when it was drawn, (B,).
        fresh: no step has been taken since the images were drawn.
    """

    given: Condition
    latents: Tensor
    advantages: Tensor
    weight: Tensor
    rewards: Tensor
    use: tuple[int, int, int]
    samples: list[Key]
    index: Tensor
    x: Tensor
    x_next: Tensor
    log_probs: Tensor
    fresh: bool


@dataclass
class Rollout:
    """What a process drew, scored and will train on."""

    number: int
    draws: Draws
    prompts: list[Prompt]
    text: dict[str, Tensor]
    trajectory: Trajectory
    scored: Scored
    stats: dict[str, float] = field(default_factory=dict)


class OnlineBatches(Batches[OnlineBatch]):
    """Draws rollouts with the policy as it stands and streams their images."""

    def __init__(self, trainer: OnlineTrainer[Any]) -> None:
        self.trainer = trainer
        self.samples = len(trainer.prompts)
        self.order = GroupOrder(self.samples, trainer.config.seed, trainer.arithmetic)
        self.current: Rollout | None = None
        self.first: OnlineBatch | None = None

    def stream(self, start_step: int, stop_step: int) -> Iterator[OnlineBatch]:
        arithmetic = self.trainer.arithmetic
        for step in range(start_step, stop_step):
            number, within = divmod(step, arithmetic.steps_per_rollout)
            if self.current is None or self.current.number != number:
                self.current = None
                self.current = self.trainer.collect(number)
            epoch, update = divmod(within, arithmetic.updates)
            yield from self._micro_batches(self.current, update, epoch, fresh=within == 0)

    def trial(self) -> tuple[OnlineBatch, str]:
        batch = self.trainer.trial_batch()
        return batch, f"{batch.latents.shape[-2]} x {batch.latents.shape[-1]} latents"

    def _micro_batches(self, drawn: Rollout, update: int, epoch: int, *, fresh: bool) -> Iterator[OnlineBatch]:
        arithmetic = self.trainer.arithmetic
        for rows in self.order.share(drawn.draws, update).split(arithmetic.micro_batch):
            for use in range(arithmetic.passes_per_image):
                batch = self.trainer.batch(drawn, rows, (drawn.number, epoch, use), fresh=fresh)
                if fresh and use == 0 and rows[0] == 0:
                    self.first = batch
                yield batch


class OnlineTrainer(PromptTrainer[Config, OnlineBatch], Generic[Config]):
    """A method that learns from rewards of its own images. A subclass gives ``needs`` and ``compute_loss``."""

    needs: ClassVar[OnlineNeeds] = OnlineNeeds()
    batches: OnlineBatches
    scorer: RolloutScorer

    def __init__(self, config: Config, family: Family | None = None) -> None:
        check_launch()
        self.arithmetic = Arithmetic(
            groups=config.num_prompts_per_rollout,
            images_per_group=config.num_images_per_prompt,
            updates=config.num_updates_per_rollout,
            epochs=config.num_inner_epochs,
            micro_batch=config.train_batch_size,
            passes_per_image=1,
            # As the accelerator will see it: without the flag, processes on CPUs would each be alone from here on.
            world_size=PartialState(
                cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=waiting(config.process_timeout)
            ).num_processes,
        )
        # Before the model is loaded: sizes that do not fit should not cost minutes.
        self.arithmetic.check()
        self.tracker = PromptStatTracker(config.tracker_buffer_size, config.tracker_min_count)
        self.stats: dict[str, float] = {}
        super().__init__(config, family)

    @classmethod
    def work(cls, config: Any, processes: int = 1) -> Work:
        return online_work(
            config,
            frozen_passes=cls.frozen_passes(config),
            replays_steps=cls.needs.steps,
            needs_reference=cls.needs_reference(config),
            copies=cls.slow_copies(config),
            processes=processes,
        )

    def passes_per_image(self) -> int:
        """Forward passes of training for each image: the sampling steps that are trained on."""
        return len(self._kept_steps(0)) if self.needs.steps else self.config.num_train_steps_per_image or 1

    def make_batches(self) -> OnlineBatches:
        config = self.config
        self.read_prompts()
        if self.needs.steps and not self.steps.stochastic:
            raise UserError(
                f"none of the {config.num_inference_steps} steps of {config.sampler} with eta {config.eta:g} has "
                "noise, so none has a density to learn from: use eta 1, and 2 steps or more"
            )
        self.arithmetic = replace(self.arithmetic, passes_per_image=self.passes_per_image())
        config.work_out(self.arithmetic)
        self.accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
        self.judge_by(RolloutScorer(config, self.accelerator, whole_groups=self.arithmetic.whole_groups()))
        return OnlineBatches(self)

    def _make_plan(self) -> Plan:
        # Micro-batches are passes over images, and a step is counted in images.
        return replace(super()._make_plan(), effective_batch=self.arithmetic.images_per_step)

    # Drawing ---------------------------------------------------------------------------------------------------

    def collect(self, number: int) -> Rollout:
        """Draw, score and weigh rollout ``number``. Raises StopAsked where the run should stop."""
        start = time.perf_counter()
        draws = self.batches.order.draws(number, self.accelerator.process_index)
        prompts = [self.prompts[i] for i in draws.prompts.tolist()]
        text = self.encode([prompt.text for prompt in prompts])
        keep = self._kept_steps(number)
        parts: list[Trajectory] = []
        jobs: list[Future[Scored]] = []
        # One thread: rewards of a batch are worked out while the next is drawn, in order.
        with ThreadPoolExecutor(1) as pool, self.drawing(), self.policy.evaluating(), self.accelerator.autocast():
            for rows in torch.arange(len(draws)).split(self.config.rollout_batch_size):
                if self.stop_asked():
                    raise StopAsked
                parts.append(self._draw(draws, text, rows, keep))
                images = self.decode(parts[-1].latents)
                chosen = [prompts[i] for i in rows.tolist()]
                jobs.append(pool.submit(self.scorer.score, images, chosen, draws.groups[rows]))
                for job in jobs:
                    if job.done():
                        job.result()  # A reward that failed ends the run now, not when all is drawn.
            sampling = time.perf_counter() - start
            scored = Scored.cat([job.result() for job in jobs])
        drawn = Rollout(number, draws, prompts, text, Trajectory.cat(parts), scored)
        self.scorer.weigh(draws, scored, self.tracker, self.prompts)
        self.stats = {
            **scored.stats,
            "rollout": number,
            "images": (number + 1) * self.arithmetic.images,
            "rollout_seconds": time.perf_counter() - start,
            "sampling_seconds": sampling,
            "reward_seconds": scored.seconds,
        }
        return drawn

    def trial_batch(self) -> OnlineBatch:
        """A micro-batch of images that are drawn, decoded and scored as those of a rollout are, for a trial.

        As many are drawn at once as in a rollout; what their advantages are does not matter.
        """
        draws = self.batches.order.draws(0, self.accelerator.process_index)
        rows = torch.arange(min(self.config.rollout_batch_size, len(draws)))
        prompts = [self.prompts[i] for i in draws.prompts[rows].tolist()]
        text = self.encode([prompt.text for prompt in prompts])
        with self.drawing(), self.policy.evaluating(), self.accelerator.autocast():
            part = self._draw(draws, text, rows, self._kept_steps(0))
            scored = self.scorer.score(self.decode(part.latents), prompts, draws.groups[rows])
        scored.total = scored.advantages = scored.weight = torch.ones(len(rows))
        micro = torch.arange(self.arithmetic.micro_batch) % len(rows)
        return self.batch(Rollout(0, draws, prompts, text, part, scored), micro, (0, 0, 0), fresh=True)

    def drawing(self) -> AbstractContextManager[Any]:
        """Whose weights draw rollouts: the policy's, or one of its copies."""
        return nullcontext()

    def _draw(self, draws: Draws, text: dict[str, Tensor], rows: Tensor, keep: list[int]) -> Trajectory:
        return rollout(
            self.family,
            self.policy.modules[self.family.denoiser_part],
            self.steps,
            self.condition(select_text(text, rows)),
            draws.seeds[rows].tolist(),
            self.latent_shape,
            keep=keep,
            storage=torch.bfloat16 if self.config.store_bf16 else torch.float32,
        )

    def _kept_steps(self, number: int) -> list[int]:
        if not self.needs.steps:
            return []
        return trained_steps(
            self.steps.stochastic,
            self.config.num_train_steps_per_image,
            lambda n: keyed_permutation(n, self.config.seed, "trained steps", number),
        )

    # Training --------------------------------------------------------------------------------------------------

    def batch(self, drawn: Rollout, rows: Tensor, use: tuple[int, int, int], *, fresh: bool) -> OnlineBatch:
        """Some images of a rollout, for use number ``use[2]`` of inner epoch ``use[1]``."""
        device = self.accelerator.device
        trajectory, scored = drawn.trajectory, drawn.scored
        step = use[2] if self.needs.steps else 0
        has = self.needs.steps
        empty = torch.zeros(len(rows), 0)
        return OnlineBatch(
            given=self.condition(select_text(drawn.text, rows)),
            latents=trajectory.latents[rows].to(device),
            advantages=scored.advantages[rows].to(device),
            weight=scored.weight[rows].to(device),
            rewards=scored.total[rows].to(device),
            use=use,
            samples=[(self.config.seed, *use, seed) for seed in drawn.draws.seeds[rows].tolist()],
            index=trajectory.index[rows, step] if has else empty.long(),
            x=trajectory.x[rows, step].float().to(device) if has else empty,
            x_next=trajectory.x_next[rows, step].float().to(device) if has else empty,
            log_probs=trajectory.log_probs[rows, step].to(device) if has else empty,
            fresh=fresh,
        )

    def training_step(self, stream: Iterator[OnlineBatch]) -> dict[str, float]:
        """One optimiser step; metrics of the rollout it belongs to stand beside its own."""
        metrics = super().training_step(stream)
        number, within = divmod(self.step - 1, self.arithmetic.steps_per_rollout)
        if within == 0:
            self._check_ratio(metrics.get("log_ratio_error", 0.0))
            assert self.batches.first is not None
            with self.accelerator.autocast(), torch.no_grad():
                found = self.health(self.batches.first)
            means = self.accelerator.reduce(torch.tensor([*found.values()], device=self.accelerator.device), "mean")
            self.stats |= dict(zip(found, means.tolist(), strict=True))
        if self.may_stop():
            # Here and not before the next rollout: a run that is stopped while it draws must not come by this twice.
            self.after_rollout(number)
        return {**self.stats, **metrics}

    def after_rollout(self, number: int) -> None:
        """Called when rollout ``number`` has been trained on, before a checkpoint: where slow copies move."""

    def health(self, batch: OnlineBatch) -> dict[str, float]:
        """What is looked at once a rollout, on each process's first micro-batch; the mean over processes is logged."""
        return {}

    def _check_ratio(self, error: float) -> None:
        if not error <= _RATIO_BOUND:
            raise DiffalignError(
                f"the importance ratio should be 1 before the first update of a rollout, but log-probabilities differ "
                f"by {error:.3g} on average (bound {_RATIO_BOUND:g}). Sampling and training see different networks. "
                "Usual causes: dropout in the policy (lora_dropout), another precision or guidance in training, or "
                "bf16/fp16 forward passes that depend on the batch: set rollout_batch_size equal to train_batch_size, "
                "or train in float32."
            )

    # The run -----------------------------------------------------------------------------------------------------

    def may_stop(self) -> bool:
        return self.step % self.arithmetic.steps_per_rollout == 0

    def save_extra(self, folder: Path) -> None:
        super().save_extra(folder)
        (folder / _TRACKER).write_text(json.dumps(self.tracker.state_dict()), encoding="utf-8")

    def load_extra(self, folder: Path) -> None:
        super().load_extra(folder)
        self.tracker.load_state_dict(json.loads((folder / _TRACKER).read_text(encoding="utf-8")))

    def facts(self) -> Mapping[str, str]:
        a, config = self.arithmetic, self.config
        guided = 2 if config.guidance_scale != 1 else 1
        drawing = a.images * config.num_inference_steps * guided
        # Only what replays steps of the sampler trains with its guidance.
        training = a.images * a.epochs * a.passes_per_image * (guided if self.needs.steps else 1)
        rollouts = self.plan.steps / a.steps_per_rollout
        return {
            "data": f"{len(self.prompts):,} prompts of {config.prompts}",
            "rollout": f"{a.images} images = {a.groups} prompts x {a.images_per_group}; {config.num_inference_steps} "
            f"{config.sampler} steps, eta {config.eta:g}, guidance {config.guidance_scale:g}",
            "batch": f"{a.images_per_step} images an update, {a.micro_batch} at once on each of {a.world_size} "
            f"process{'es' if a.world_size > 1 else ''}, {a.passes_per_image} passes over each",
            "steps": f"{self.plan.steps:,} updates, {a.steps_per_rollout} a rollout ({a.updates} shares x {a.epochs} "
            f"inner epochs): {rollouts:,.0f} rollouts, {rollouts * a.images:,.0f} images",
            "network": f"{drawing:,} samples through it to draw a rollout, {training:,} to train on it",
            "rewards": self.scorer.describe(),
        }
