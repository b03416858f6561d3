"""LoRA in the layout of kohya's scripts, which ComfyUI, A1111 and Forge read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class KohyaNames:
    """How a family is called in kohya files."""

    ldm_unet: bool
    text: Mapping[str, str]
