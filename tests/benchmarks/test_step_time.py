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
        batch = replace(batch, advantages=torch.linspace(-1, 2, 8), weight=torch.ones(8), fresh=False)
    parameters = list(trainer.policy.parameters.values())
    move([parameters], seed=0)  # From the start, where policy and reference are one,
    for name in getattr(trainer.policy, "copies", ()):
        trainer.policy.update_copy(name, 0.0)
    bare = step_time.BareLoop(trainer, batch)
    move([parameters, bare.parameters], seed=1)  # and from the slow copies.
    with torch.enable_grad():
        theirs, _ = trainer.compute_loss(batch)
        own = bare.loss()
    assert own.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6)
    expected, found = torch.autograd.grad(theirs, parameters), torch.autograd.grad(own, bare.parameters)
    scale = float(max(gradient.abs().max() for gradient in expected))
    assert scale > 0
    assert max(float((one - other).abs().max()) for one, other in zip(expected, found, strict=True)) < 1e-3 * scale


def move(networks: list[list[torch.nn.Parameter]], seed: int) -> None:
    """The same random change of the weights of each network."""
    for parameters in networks:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
