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
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )
    ema = EMAModel(parameters, decay=schedule.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(parameters[0].device)
    path = work / f"{name}.pt"
    start = 0
    if path.exists():
        state = torch.load(path, map_location=parameters[0].device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        ema.to(parameters[0].device)
        start = state["step"]
        logger.info("%s: resumed at step %d of %d", name, start, schedule.last)

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
        torch.save({**state, "step": step}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        if on_sample is not None:
            ema.store(parameters)
            ema.copy_to(parameters)
            on_sample(step)
            ema.restore(parameters)

    clock, running = time.monotonic(), []
    module.train()
    for step in range(start, schedule.last):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        running.append(loss.detach())
        done = step + 1
        if done % schedule.log_every == 0 or done == schedule.last:
            pace = (time.monotonic() - clock) / len(running)
            mean = torch.stack(running).mean().item()
            left = pace * (schedule.last - done) / 60
            logger.info("%s %d/%d loss %.4f, %.3f s/step, %.0f min left", name, done, schedule.last, mean, pace, left)
            clock, running = time.monotonic(), []
        if done % schedule.save_every == 0 or done == schedule.last:
            save(done)
            clock = time.monotonic()
    ema.copy_to(parameters)
    module.eval()
