"""The bare loops that the training loop is timed against do the work that the trainers do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

Script = Callable[[str], ModuleType]


@pytest.mark.parametrize("method", ["dpo", "mapo", "sft", "ddpo", "awm"])
def test_a_bare_loop_has_the_trainers_loss_and_gradient(method: str, script: Script, tmp_path: Path) -> None:
    step_time = script("step_time")
    trainer = step_time.make(method, str(tmp_path), 8, 2)
    batch = next(trainer.batches.stream(0, 1))
    if hasattr(batch, "advantages"):
        batch = replace(batch, advantages=torch.linspace(-1, 2, 8), weight=torch.ones(8))
    generator = torch.Generator().manual_seed(0)
    parameters = trainer.policy.parameters
    for parameter in parameters.values():
        # Away from the start, where policy and reference are one.
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    for name in getattr(trainer.policy, "copies", ()):
        trainer.policy.update_copy(name, 0.0)
    bare = step_time.BareLoop(trainer, batch)
    with torch.enable_grad():
        theirs, _ = trainer.compute_loss(batch)
        own = bare.loss()
    assert own.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6)
    gradients = zip(
        torch.autograd.grad(theirs, list(parameters.values())),
        torch.autograd.grad(own, bare.parameters),
        strict=True,
    )
    scale = max(gradient.abs().max() for gradient in torch.autograd.grad(bare.loss(), bare.parameters))
    assert scale > 0
    assert max(float((one - other).abs().max()) for one, other in gradients) < 1e-3 * scale
