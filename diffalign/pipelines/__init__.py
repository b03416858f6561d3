"""Model families behind one narrow contract: :class:`~diffalign.pipelines.base.Family`.

    family = load_family("stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.bfloat16, device="cuda")
    add_lora(family.denoiser, LoraSpec(rank=16))
    text = family.encode_prompts(["a red circle"])
    pred = family.predict(family.denoiser, latents, timesteps, text, sizes)
    save_lora(family, "out")

Names are imported on first use, because they need torch and diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.pipelines.base import Family
    from diffalign.pipelines.detect import load_family
    from diffalign.pipelines.lora import (
        LoraSpec,
        adapters_off,
        add_lora,
        load_lora_state,
        lora_parameters,
        save_lora,
    )

_EXPORTS = {
    "Family": "base",
    "LoraSpec": "lora",
    "adapters_off": "lora",
    "add_lora": "lora",
    "load_family": "detect",
    "load_lora_state": "lora",
    "lora_parameters": "lora",
    "save_lora": "lora",
}

__all__ = [
    "Family",
    "LoraSpec",
    "adapters_off",
    "add_lora",
    "load_family",
    "load_lora_state",
    "lora_parameters",
    "save_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
