"""The methods: one file each, found by name."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from diffalign.errors import UserError, did_you_mean


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
