"""Which settings would make a run fit: those nearest to what was asked for, found by estimating them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from diffalign.errors import UserError
from diffalign.estimation.cards import Calibration, Card
from diffalign.estimation.estimate import Estimate, first_that_fits
from diffalign.estimation.work import Work

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
    if config.train_mode == "full":
        if config.optimizer == "adamw" and not config.use_8bit_adam:
            yield {"use_8bit_adam": True}
        yield {"train_mode": "lora", "use_8bit_adam": False}
    elif config.rank > 16:
        yield {"rank": 16}
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
