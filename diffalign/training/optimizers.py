"""Optimiser and learning-rate schedule, as a config names them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from diffalign.errors import UserError, did_you_mean
from diffalign.training.config import RunConfig


def build_optimizer(
    config: RunConfig, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Adafactor over ``parameters``.

    Raises:
        UserError: 8-bit AdamW without bitsandbytes.
    """
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=learning_rate,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
            weight_decay=config.weight_decay,
        )
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError(
                "use_8bit_adam needs bitsandbytes, which is not installed: pip install 'diffalign[gpu]' on a CUDA "
                "machine, or leave use_8bit_adam off."
            ) from error
        adamw8bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **settings)
        return adamw8bit
    trained = list(parameters)
    # One kernel for all of it; not with fp16, where the step itself would have to tell the loop that it was skipped.
    fused = config.mixed_precision != "fp16" and all(p.is_cuda for p in trained)
    return torch.optim.AdamW(trained, **settings, fused=fused)


def state_bytes(config: RunConfig) -> int:
    """Bytes of the optimiser's state for each number that trains."""
    if config.optimizer == "adafactor":
        return 0  # Factored second moments: a row and a column instead of a matrix.
    return 2 if config.use_8bit_adam else 8


def build_schedule(config: RunConfig, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The schedule named ``config.lr_scheduler`` over ``steps`` optimiser steps.

    It is stepped once per optimiser step and never prepared by accelerate, which would step it once per process.

    Raises:
        UserError: there is no schedule of that name.
    """
    known = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    if config.lr_scheduler not in known:
        raise UserError(
            f"lr_scheduler {config.lr_scheduler!r} is not one of {', '.join(known)}."
            + did_you_mean(config.lr_scheduler, known)
        )
    schedule: LRScheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps
    )
    return schedule
