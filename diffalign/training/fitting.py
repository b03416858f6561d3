"""Which settings would make a run fit: those nearest to what was asked for, found by estimating them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from diffalign.errors import UserError
from diffalign.estimation.cards import Calibration, Card, load_calibration
from diffalign.estimation.estimate import Estimate, estimate, first_that_fits
from diffalign.estimation.work import Work
from diffalign.training.work import model_of

_RESOLUTIONS = (1024, 768, 512)


def what_would_fit(
    config: Any, work: Callable[[Any], Work], card: Card, calibration: Calibration, limit: int = 3
) -> list[tuple[str, Estimate]]:
    """Alternatives to a config that fit a card: (the settings to change, what the run then needs).

    Args:
        config: that does not fit.
        work: what a run of a config does.
        card, calibration: to fit.
        limit: how many to look for.
    """
    return first_that_fits(
        ((name, work(changed)) for name, changed in alternatives(config)), card, calibration, limit=limit
    )


def explain(config: Any, work: Callable[[Any], Work], phase: str, device: torch.device) -> UserError:
    """The error for a device that was too small for a config: what to change, by estimating it.

    Args:
        config, work: as for :func:`what_would_fit`.
        phase: in which it ran out.
        device: on which.
    """
    side = model_of(config)
    size = f"{side.height} x {side.width}" if side.height else "the model's own size"
    text = f"out of memory in {phase}: {config.train_batch_size} at once, {size} pixels, on {device}."
    calibration = load_calibration()

    def of_training(config: Any) -> Work:
        whole = work(config)
        return replace(whole, phases=tuple(phase for phase in whole.phases if not phase.before_training))

    found = estimate(of_training(config), Card(str(device), float("inf")), calibration)
    # Whatever the estimate says of these settings, they did not fit.
    reserve = calibration.reserve_gib * 2**30
    memory = reserve + 0.9 * (found.needed - reserve)
    if device.type == "cuda":
        memory = min(memory, torch.cuda.get_device_properties(device).total_memory)
    options = what_would_fit(config, of_training, Card(str(device), memory), calibration)
    settings = [f"{name} (about {other.needed / 2**30:.1f} GiB)" for name, other in options]
    advice = f"Use {'; or '.join(settings)}." if settings else "Take a larger card, or fewer pixels."
    return UserError(
        f"{text} These settings are estimated to need {found.needed / 2**30:.1f} GiB, most of it in the phase "
        f"{found.largest.name!r}. {advice} Close what else uses the card; `diffalign estimate` tells more."
    )


def alternatives(config: Any) -> Iterator[tuple[str, Any]]:
    """Configs that need less memory, with what they change: first those that leave the result as it is.

    Each change alone, then each together with those before it.
    """
    changes = list(_changes(config))
    steps = [[change] for change in changes]
    together: dict[str, Any] = {}
    for change in changes:
        together = {**together, **change}
        steps.append([together])
    seen = set()
    for (change,) in steps:
        name = ", ".join(f"{key}: {_text(value)}" for key, value in change.items())
        if name in seen:
            continue
        seen.add(name)
        try:
            changed = dataclasses.replace(config, **change)
        except UserError:  # These settings do not go together, so they are no alternative.
            continue
        yield name, changed


def _changes(config: Any) -> Iterator[dict[str, Any]]:
    """Settings that need less memory, one kind after the other, in the order of what they cost."""
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    elif config.checkpointed_blocks:
        yield {"checkpointed_blocks": None}
    if getattr(config, "cache_latents", True) is False:
        yield {"cache_latents": True}
    if getattr(config, "decode_batch_size", 1) > 1:
        yield {"decode_batch_size": 1}
    yield from _smaller_batches(config)
    if getattr(config, "two_pass_gradient", True) is False:
        yield {"two_pass_gradient": True}
    if not config.offload_idle and not getattr(config, "cache_latents", False):
        yield {"offload_idle": True}
    if config.train_mode == "full":
        if config.optimizer == "adamw" and not config.use_8bit_adam:
            yield {"use_8bit_adam": True}
        yield {"train_mode": "lora", "use_8bit_adam": False}
    elif config.rank > 16:
        yield {"rank": 16}
    if config.train_mode == "lora" and config.quantize_base == "none":
        yield {"quantize_base": "8bit"}
        yield {"quantize_base": "4bit"}
    side = config.resolution
    yield from ({"resolution": smaller} for smaller in _RESOLUTIONS if side is not None and smaller < side)


def _smaller_batches(config: Any) -> Iterator[dict[str, Any]]:
    """The same samples in a step, fewer at once."""
    rollouts = hasattr(config, "num_prompts_per_rollout")
    size, count = config.train_batch_size, config.gradient_accumulation_steps
    while size > 1 and size % 2 == 0:
        size, count = size // 2, count * 2
        change = {"train_batch_size": size}
        if not rollouts:
            change["gradient_accumulation_steps"] = count
        if getattr(config, "rollout_batch_size", 0) > size:
            change["rollout_batch_size"] = size
        yield change


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
