"""What makes a network fast or small and leaves its results as they are, up to rounding: see docs/speed.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffalign.errors import UserError, did_you_mean
from diffalign.training.config import TrainingConfig

_COMPILED_VARIANTS = 64


def checkpoint_activations(module: nn.Module, blocks: Sequence[str] | None = None) -> None:
    """Recompute activations in the backward pass. Passes without gradient, as the reference's, never do.

    Args:
        module: a denoiser of diffusers, or a text encoder of transformers.
        blocks: only what lies in these, such as "down_blocks.0" and "mid_block"; None is everywhere.

    Raises:
        UserError: there is no such block.
    """
    enable: Any = getattr(module, "enable_gradient_checkpointing", None) or module.gradient_checkpointing_enable
    enable()
    if blocks is None:
        return
    able = {name: child for name, child in module.named_modules() if hasattr(child, "gradient_checkpointing")}
    for block in blocks:
        if not any(_within(name, block) for name in able):
            raise UserError(
                f"checkpointed_blocks: {block!r} is no block of {type(module).__name__}.{did_you_mean(block, able)} "
                f"Its blocks are {', '.join(name for name in able if 'attentions' not in name)}."
            )
    for name, child in able.items():
        child.gradient_checkpointing = any(_within(name, block) for block in blocks)


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def speed_up(denoiser: Any, config: TrainingConfig) -> None:
    """Give a denoiser the attention, memory format and compilation that a config asks for.

    Policy and reference must both have them, or they would differ before any training.

    Raises:
        UserError: xformers is asked for and not there.
    """
    if config.enable_xformers_memory_efficient_attention:
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise UserError(
                f"xformers attention is not available ({error}). Install it with pip install 'diffalign[gpu]' on "
                "a CUDA machine, or leave enable_xformers_memory_efficient_attention off: SDPA is the default."
            ) from error
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if config.compile_repeated_blocks:
        # A block is compiled for each of its widths, with and without adapters, with and without gradient, in
        # training and in validation: more variants than torch allows by default before it quietly runs uncompiled.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, _COMPILED_VARIANTS)
        # Fused kernels then round where separate ones would: in bfloat16, what is drawn without gradient, or without
        # compilation, is what training sees.
        torch._inductor.config.emulate_precision_casts = True
        denoiser.compile_repeated_blocks()


class SameGraph(nn.Module):
    """A compiled denoiser whose output has no gradient and is computed as in training.

    Without gradient, or with its adapters off, a block would be compiled once more, with other fusions and so other
    roundings: in bfloat16 policy and reference would differ before any training, by as much as a step changes.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The denoiser's outputs as a tuple, detached; the arguments are its own, with ``return_dict=False``."""
        with torch.enable_grad():
            outputs = self.denoiser(*args, **kwargs)
        return tuple(output.detach() for output in outputs)
