"""Schedulers for sampling: the checkpoint's own, or another one by name on the checkpoint's noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import yaml
from diffusers import SchedulerMixin

from diffalign.errors import UserError, did_you_mean

NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}


def parse_scheduler(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The class that a name stands for, the options of it that follow the name, and those of its ``set_timesteps``.

    Args:
        name: a short name of :data:`NAMES`, or the name of a diffusers scheduler class; options may follow, as in
            ``lcm:original_inference_steps=20:timestep_scaling=5``. Of ``set_timesteps`` there is ``strength``, where
            the scheduler has it: ``lcm:strength=0.8`` starts at timestep 799, as image to image does.

    Raises:
        UserError: diffusers has no such scheduler, or it has no such option.
    """
    whole = name
    name, *listed = whole.split(":")
    kind: Any = getattr(diffusers, NAMES.get(name, name), None)
    is_scheduler = inspect.isclass(kind) and issubclass(kind, SchedulerMixin) and kind is not SchedulerMixin
    if not is_scheduler:
        raise UserError(
            f"scheduler {name!r} is unknown. Use one of {', '.join(NAMES)}, or a scheduler class of diffusers."
            + did_you_mean(name, NAMES)
        )
    own, stepping = (set(inspect.signature(f).parameters) for f in (kind.__init__, kind.set_timesteps))
    names = [*sorted(own - {"self", "kwargs"}), *({"strength"} & stepping)]
    options: dict[str, Any] = {}
    for word in listed:
        option, equals, value = word.partition("=")
        if option not in names or not equals:
            raise UserError(
                f"{word!r} in scheduler {whole!r} is no option=value of {kind.__name__}." + did_you_mean(option, names)
            )
        options[option] = yaml.safe_load(value)
    strength = options.pop("strength", 1)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise UserError(f"strength in scheduler {whole!r} must be above 0 and at most 1, got {strength!r}")
    return kind, options, {"strength": strength} if strength != 1 else {}


def make_scheduler(name: str, config: Mapping[str, Any], **options: Any) -> SchedulerMixin:
    """Build a scheduler from a checkpoint's ``scheduler_config.json``.

    Args:
        name: as of :func:`parse_scheduler`.
        config: the checkpoint's scheduler config; betas, prediction type and time spacing come from it.
        options: arguments of the scheduler's class that replace those of ``config`` and of the name.

    Raises:
        UserError: as :func:`parse_scheduler`.
    """
    kind, named, stepping = parse_scheduler(name)
    # Latents are not confined to [-1, 1]; some schedulers clip to it unless they are told not to.
    clips = "clip_sample" in inspect.signature(kind.__init__).parameters and "clip_sample" not in config
    own = {**({"clip_sample": False} if clips else {}), **named, **options}
    scheduler: Any = kind.from_config(dict(config), **own)
    if stepping:
        # Text-to-image pipelines have no argument for it.
        scheduler.set_timesteps = partial(scheduler.set_timesteps, **stepping)
    made: SchedulerMixin = scheduler
    return made
