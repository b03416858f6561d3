"""Options of speed whose libraries are not here say so; those that are, are set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import UserError
from diffalign.pipelines import load_family
from diffalign.training.optimizers import build_optimizer, state_bytes
from diffalign.training.speed import speed_up


def test_xformers_that_is_not_there_is_an_error_with_the_way_out(toy_config: Any, tiny_sdxl_path: str) -> None:
    """Without it, and with it on a machine that has no CUDA."""
    config = toy_config(enable_xformers_memory_efficient_attention=True)
    with pytest.raises(UserError, match="SDPA is the default"):
        speed_up(load_family(tiny_sdxl_path).denoiser, config)


def test_8_bit_adam_without_its_library_is_an_error(toy_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    weights = [torch.nn.Parameter(torch.zeros(3))]
    with pytest.raises(UserError, match="leave use_8bit_adam off"):
        build_optimizer(toy_config(use_8bit_adam=True), weights, 1e-3)


@pytest.mark.parametrize(("options", "size"), [({}, 8), ({"optimizer": "adafactor"}, 0)])
def test_an_optimiser_keeps_what_an_estimate_counts(toy_config: Any, options: dict[str, Any], size: int) -> None:
    config = toy_config(**options)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = build_optimizer(config, [weight], 1e-3)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert state_bytes(config) == size
    # A step count, or a row and a column, come on top.
    assert kept == pytest.approx(size * weight.numel(), abs=4 * 2 * 64 + 4)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Off, and afterwards as it was."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_is_switched_on_by_a_run(tf32: None, toy_config: Any, toy_trainer: Any, tmp_path: Path) -> None:
    toy_trainer(toy_config(str(tmp_path / "plain")))
    assert not torch.backends.cuda.matmul.allow_tf32
    toy_trainer(toy_config(str(tmp_path / "fast"), allow_tf32=True))
    assert torch.backends.cuda.matmul.allow_tf32
