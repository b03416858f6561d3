"""The methods: one file each, found by name."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffalign.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """Where a method lives; its module is imported when the method is asked for."""

    module: str
    config: str
    trainer: str
    summary: str


METHODS = {
    "dpo": Method(
        "diffalign.trainers.dpo",
        "DPOConfig",
        "DPOTrainer",
        "Diffusion-DPO: learn from pairs of a better and a worse image",
    ),
    "mapo": Method(
        "diffalign.trainers.mapo",
        "MaPOConfig",
        "MaPOTrainer",
        "MaPO: pairs without a reference model; less time and memory a step",
    ),
    "dcpo": Method(
        "diffalign.trainers.dcpo",
        "DCPOConfig",
        "DCPOTrainer",
        "DCPO: pairs with a caption of its own for each image",
    ),
    "cpo": Method(
        "diffalign.trainers.cpo",
        "CPOConfig",
        "CPOTrainer",
        "CPO: a logit without a reference beside the denoising loss",
    ),
    "orpo": Method(
        "diffalign.trainers.orpo",
        "ORPOConfig",
        "ORPOTrainer",
        "ORPO: the denoising loss with a ratio term, without a reference",
    ),
    "dmpo": Method(
        "diffalign.trainers.dmpo",
        "DMPOConfig",
        "DMPOTrainer",
        "DMPO: match a target preference in reverse KL divergence",
    ),
    "dspo": Method(
        "diffalign.trainers.dspo",
        "DSPOConfig",
        "DSPOTrainer",
        "DSPO: fit the preferred score with a correction from the reference",
    ),
    "bdpo": Method(
        "diffalign.trainers.bdpo",
        "BDPOConfig",
        "BDPOTrainer",
        "bounded DPO: the rejected image's part of the logit is bounded",
    ),
    "sft": Method(
        "diffalign.trainers.sft",
        "SFTConfig",
        "SFTTrainer",
        "supervised fine-tuning on liked images: the baseline and first stage",
    ),
    "kto": Method(
        "diffalign.trainers.kto",
        "KTOConfig",
        "KTOTrainer",
        "Diffusion-KTO: likes and dislikes of single images, no pairs",
    ),
    "ddpo": Method(
        "diffalign.trainers.ddpo",
        "DDPOConfig",
        "DDPOTrainer",
        "DDPO: any reward, policy gradients through the steps of the sampler",
    ),
    "rwr": Method(
        "diffalign.trainers.rwr",
        "RWRConfig",
        "RWRTrainer",
        "DDPO-RWR: any reward, denoise own images weighted by it",
    ),
    "awm": Method(
        "diffalign.trainers.awm",
        "AWMConfig",
        "AWMTrainer",
        "AWM: any reward, the training loss weighted by advantage",
    ),
    "nft": Method(
        "diffalign.trainers.nft",
        "NFTConfig",
        "NFTTrainer",
        "DiffusionNFT: any reward, liked against disliked on the forward process",
    ),
    "reward_gradient": Method(
        "diffalign.trainers.reward_gradient",
        "RewardGradientConfig",
        "RewardGradientTrainer",
        "ReFL, DRaFT, AlignProp: a differentiable reward, through the sampler",
    ),
    "lcd": Method(
        "diffalign.trainers.lcd",
        "LCDConfig",
        "LCDTrainer",
        "LCD: distil into a student that draws in 1 to 8 steps",
    ),
    "rg_lcd": Method(
        "diffalign.trainers.rg_lcd",
        "RGLCDConfig",
        "RGLCDTrainer",
        "RG-LCD: distil to 1 to 8 steps and align by a reward, in one run",
    ),
}
"""Name on the command line -> method. A new method adds its line here."""


def load_method(name: str) -> tuple[type[Any], type[Any]]:
    """Return the config dataclass and the trainer class of a method; ``trainer(config).train()`` runs it.

    Raises:
        UserError: there is no method of that name.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) or f" Methods: {', '.join(METHODS)}."
        raise UserError(f"there is no method {name!r}.{hint}")
    method = METHODS[name]
    module = importlib.import_module(method.module)
    return getattr(module, method.config), getattr(module, method.trainer)


def settings_for(name: str, settings: Mapping[str, Any], source: str = "config") -> dict[str, Any]:
    """The settings of a file, for a method that need not be the one the file was written for.

    Settings that only other methods have, such as the beta of the method that was there before, are left out, and a
    log line says which. Keys that no method has stay, for whoever checks them.

    Args:
        name: the method that is to run.
        settings: keys and values of the file; ``method`` is set to ``name``.
        source: name of the file.

    Raises:
        UserError: there is no method of that name.
    """
    own = _field_names(name)
    foreign = {key: [m for m in METHODS if m != name and key in _field_names(m)] for key in settings if key not in own}
    dropped = [f"{key}: {settings[key]} (of {', '.join(methods)})" for key, methods in foreign.items() if methods]
    if dropped:
        only = sorted(own - set[str]().union(*(_field_names(m) for m in METHODS if m != name)))
        logger.warning(
            "%s: %s has no %s; left out.%s",
            source,
            name,
            ", ".join(dropped),
            f" Its own settings: {', '.join(only)}." if only else "",
        )
    return {**{key: value for key, value in settings.items() if not foreign.get(key)}, "method": name}


def _field_names(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(load_method(method)[0])}
