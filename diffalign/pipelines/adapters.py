"""Adding a LoRA to a network, and switching it off to get the base model back.

LoRA (Hu et al. 2021, arXiv 2106.09685): ``W x + (alpha / rank) B A x``. With the adapters off the model is the base
model bit for bit, so policy and reference share their weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from diffalign.errors import UserError, did_you_mean

DENOISER_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
_ADAPTABLE = (nn.Linear, nn.Conv2d, BaseTunerLayer)


@dataclass(frozen=True)
class LoraSpec:
    """How a LoRA is made.

    Attributes:
        rank: at least 1.
        alpha: the update is scaled by ``alpha / rank``; None means alpha = rank, a scale of 1.
        dropout: on the LoRA's input in training, in [0, 1).
        targets: module names, or their endings ("to_q", "ff.net.2"); None is the attention projections.
        init: of A, B being 0: "gaussian" with standard deviation 1 / rank, or "default", Kaiming-uniform.

    Raises:
        UserError: a value is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    init: Literal["gaussian", "default"] = "gaussian"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"LoRA rank must be a whole number of at least 1, but is {self.rank!r}.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"LoRA alpha must be positive, but is {self.alpha!r}. Leave it out for alpha = rank.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout must be in [0, 1), but is {self.dropout!r}.")
        if self.targets is not None and (not isinstance(self.targets, list | tuple) or not self.targets):
            raise UserError(f"LoRA targets must be a list of module names, but are {self.targets!r}.")
        if self.init not in ("gaussian", "default"):
            raise UserError(f"LoRA init {self.init!r} is not one of gaussian, default.")

    def config(self, targets: Sequence[str]) -> LoraConfig:
        """The peft config for modules whose names end in one of ``targets``."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha if self.alpha is not None else self.rank,
            lora_dropout=self.dropout,
            target_modules=list(targets),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )


def add_lora(
    module: nn.Module,
    spec: LoraSpec,
    adapter_name: str = "default",
    *,
    targets: Sequence[str] | None = None,
    seed: int | None = None,
) -> int:
    """Add a LoRA to a denoiser or a text encoder, trainable, in float32, and make it the active one.

    Args:
        targets: what to adapt where ``spec`` does not say; by default the attention projections.
        seed: of the initial weights; None draws them from torch's global generator.

    Returns:
        The number of trainable parameters that it added.

    Raises:
        UserError: the adapter exists already, or a target matches no module.
    """
    chosen = spec.targets or targets or (TEXT_TARGETS if isinstance(module, PreTrainedModel) else DENOISER_TARGETS)
    if adapter_name in getattr(module, "peft_config", {}):
        raise UserError(f"{type(module).__name__} already has a LoRA named {adapter_name!r}; choose another name.")
    _check_targets(module, chosen)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        module.add_adapter(spec.config(chosen), adapter_name=adapter_name)  # type: ignore[operator]
    cast_training_params(module, torch.float32)
    return sum(p.numel() for p in lora_parameters(module, adapter_name).values())


def _check_targets(module: nn.Module, targets: Sequence[str]) -> None:
    names = [name for name, child in module.named_modules() if isinstance(child, _ADAPTABLE) and name]
    endings = {".".join(name.split(".")[-n:]) for name in names for n in (1, 2, 3)}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            common = sorted({name.split(".")[-1] for name in names if not name.split(".")[-1].isdigit()})
            raise UserError(
                f"LoRA target {target!r} matches no linear or convolutional module of {type(module).__name__}."
                + did_you_mean(target, endings)
                + f" It has modules ending in {', '.join(common)}."
            )


def lora_parameters(module: nn.Module, adapter_name: str | None = None) -> dict[str, nn.Parameter]:
    """The LoRA parameters of a module, which may be wrapped, by their names in the bare module.

    Args:
        adapter_name: of one adapter; None is all of them.
    """
    part = ".lora_" if adapter_name is None else f".{adapter_name}."
    bare = extract_model_from_parallel(module, keep_torch_compile=False)
    return {name: p for name, p in bare.named_parameters() if ".lora_" in name and part in name}


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within the context, ``module`` (bare, or wrapped by DDP or torch.compile) is its base model.

    What was on, off, trainable or frozen before is so again afterwards, also after an exception. Do not enter or leave
    it inside a checkpointed region: the recomputation would see other adapters than the forward pass did.

    Raises:
        ValueError: the module has no adapters, so that the reference would be the policy itself.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no adapters to switch off.")
    off = [layer.disable_adapters for layer in layers]
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_off in zip(layers, off, strict=True):
            layer.enable_adapters(not was_off)
        for parameter, was_trainable in trainable:
            parameter.requires_grad_(was_trainable)
