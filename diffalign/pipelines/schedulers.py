"""Schedulers for sampling: the checkpoint's own, or another one by name on the checkpoint's noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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


def make_scheduler(name: str, config: Mapping[str, Any], **options: Any) -> SchedulerMixin:
    """Build a scheduler from a checkpoint's ``scheduler_config.json``.

    Args:
        name: a short name of :data:`NAMES`, or the name of a diffusers scheduler class; options of its own may
            follow, as in ``lcm:original_inference_steps=20:timestep_scaling=5``.
        config: the checkpoint's scheduler config; betas, prediction type and time spacing come from it.
        options: arguments of the scheduler's class that replace those of ``config``.

    Raises:
        UserError: diffusers has no such scheduler, or it has no such option.
    """
    whole = name
    name, *listed = whole.split(":")
    kind: Any = getattr(diffusers, NAMES.get(name, name), None)
    is_scheduler = inspect.isclass(kind) and issubclass(kind, SchedulerMixin)
    if not is_scheduler:
        raise UserError(
            f"scheduler {name!r} is unknown. Use one of {', '.join(NAMES)}, or a scheduler class of diffusers."
            + did_you_mean(name, NAMES)
        )
    known = inspect.signature(kind.__init__).parameters
    for word in listed:
        option, equals, value = word.partition("=")
        if option not in known or not equals:
            names = [one for one in known if one not in ("self", "kwargs")]
            raise UserError(
                f"{word!r} in scheduler {whole!r} is no option=value of {kind.__name__}." + did_you_mean(option, names)
            )
        options.setdefault(option, yaml.safe_load(value))
    # Latents are not confined to [-1, 1]; some schedulers clip to it unless they are told not to.
    clips = "clip_sample" in known and "clip_sample" not in config
    return kind.from_config(dict(config), **({"clip_sample": False} if clips else {}), **options)
