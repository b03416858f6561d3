"""One resumable training stage: a seeded loop with warm-up, cosine decay, EMA, progress and a state file."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Length and pace of a stage. ``save_every`` and ``log_every`` are in steps.

    ``stop`` ends the stage early, at the pace of the whole: a model that is left imperfect on purpose.
    """

    steps: int
    learning_rate: float
    stop: int | None = None
    warmup: int = 100
    ema_decay: float = 0.999
    weight_decay: float = 1e-4
    log_every: int = 100
    save_every: int = 500

    @property
    def last(self) -> int:
        """Steps that are really taken."""
        return self.stop or self.steps

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then half a cosine down to a hundredth."""
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * max(decay, 0.01)


class _Progress:
    """A stage's optimiser, EMA and step, kept in a state file."""

    def __init__(self, name: str, module: nn.Module, schedule: Schedule, work: Path) -> None:
        self.module, self.path = module, work / f"{name}.pt"
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
        )
        self.ema = EMAModel(self.parameters, decay=schedule.ema_decay, use_ema_warmup=True, power=0.75)
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=self.parameters[0].device, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.step = state["step"]
            logger.info("%s: resumed at step %d of %d", name, self.step, schedule.last)
        self.ema.to(self.parameters[0].device)

    def save(self, on_sample: Callable[[int], None] | None) -> None:
        """Write the state file, whole or not at all, and show samples of the EMA."""
        parts = {"module": self.module, "optimizer": self.optimizer, "ema": self.ema}
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "step": self.step}, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)
        if on_sample is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
            on_sample(self.step)
            self.ema.restore(self.parameters)


def train_stage(
    name: str,
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    schedule: Schedule,
    work: Path,
    on_sample: Callable[[int], None] | None = None,
) -> None:
    """Train ``module`` in place and leave it with its EMA weights.

    ``loss_of_step(step)`` must draw its batch from the step alone: then a stage that is stopped and started again
    ends where an uninterrupted one would. State is kept in ``work/<name>.pt``.
    """
    progress = _Progress(name, module, schedule, work)
    clock, running = time.monotonic(), []
    module.train()
    while progress.step < schedule.last:
        for group in progress.optimizer.param_groups:
            group["lr"] = schedule.rate(progress.step)
        loss = loss_of_step(progress.step)
        progress.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(progress.parameters, 1.0)
        progress.optimizer.step()
        progress.ema.step(progress.parameters)
        progress.step += 1
        running.append(loss.detach())
        done = progress.step
        if done % schedule.log_every == 0 or done == schedule.last:
            pace = (time.monotonic() - clock) / len(running)
            mean = torch.stack(running).mean().item()
            left = pace * (schedule.last - done) / 60
            logger.info("%s %d/%d loss %.4f, %.3f s/step, %.0f min left", name, done, schedule.last, mean, pace, left)
            clock, running = time.monotonic(), []
        if done % schedule.save_every == 0 or done == schedule.last:
            progress.save(on_sample)
            clock = time.monotonic()
    progress.ema.copy_to(progress.parameters)
    module.eval()
