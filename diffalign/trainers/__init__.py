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
