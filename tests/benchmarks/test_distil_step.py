"""The bare loops of LCD and RG-LCD are those methods: written apart from the trainers, they agree with them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def distil_step() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("distil_step")
    finally:
        sys.path.remove(str(BENCHMARKS))


def pass_the_clamp(bare: Any) -> None:
    """Let gradients of pixels beyond [0, 1] through, as the trainer does; a reader of the paper stops them."""

    def decode(latents: Tensor) -> Tensor:
        images = bare.vae.decode(latents / bare.vae.config.scaling_factor).sample / 2 + 0.5
        return images + (images.clamp(0, 1) - images).detach()

    bare.decode = decode


@pytest.mark.parametrize("way", ["lcd", "rg_lcd", "rg_lcd-proxy"])
def test_a_bare_loop_has_the_loss_and_the_gradient_of_the_trainer(
    way: str, distil_step: ModuleType, tmp_path: Path
) -> None:
    own = distil_step.settings(way, tmp_path, 3, **({} if way == "lcd" else {"reward_scale": 1.0}))
    trainer, kept = distil_step.make_trainer(own), tmp_path / "batch.safetensors"
    distil_step.keep_batch(trainer, kept)
    bare = distil_step.make_bare(way, own, kept, torch.device("cpu"))
    with torch.no_grad():
        for theirs, ours in zip(bare.parameters, trainer.policy.parameters.values(), strict=True):
            # Off the start of a LoRA, where student and teacher are one network.
            ours.add_(0.01 * torch.randn(ours.shape, generator=torch.Generator().manual_seed(ours.numel())))
            theirs.copy_(ours)
    if way == "rg_lcd":
        pass_the_clamp(bare)
    if way == "rg_lcd-proxy":
        # The patch embedding of latents starts otherwise.
        bare.proxy.load_state_dict(trainer.learner.proxy.clip.state_dict())
    metrics = trainer.training_step(trainer.batches.stream(0, 1))
    loss = bare.loss()
    gradients = torch.autograd.grad(loss, bare.parameters)
    assert loss.item() == pytest.approx(metrics["loss"], rel=1e-3)
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    assert norm.item() == pytest.approx(metrics["grad_norm"], rel=1e-2)
    if way != "lcd":
        assert abs(metrics["loss"] - metrics["distillation"]) > 0.1, "the reward must count, or nothing is shown of it"
    if way == "rg_lcd-proxy":
        decode = bare.decode
        # Where nothing is differentiated, the trainer's expert is shown pixels of 8 bits, as from a file.
        bare.decode = lambda latents: (255 * decode(latents)).round() / 255
        assert bare.proxy_loss().item() == pytest.approx(metrics["proxy_loss"], rel=1e-3)
