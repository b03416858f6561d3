"""What only a GPU can show: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffalign.trainers.dpo import DPOConfig, DPOTrainer

Losses = Callable[..., list[float]]


@pytest.fixture
def losses(on_pairs: Callable[..., dict[str, Any]]) -> Losses:
    def train(folder: Path, **own: Any) -> list[float]:
        run = DPOTrainer(DPOConfig(**on_pairs(folder, **{"beta_dpo": 500, **own}))).train()
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    return train


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_first_loss_is_ln_2_in_every_precision(losses: Losses, tmp_path: Path, precision: str) -> None:
    table = losses(tmp_path, mixed_precision=precision)
    assert table[0] == pytest.approx(0.6931472, abs=1e-6)
    assert table[-1] != table[0]


def test_compiled_blocks_give_the_losses_of_eager_ones(losses: Losses, tmp_path: Path) -> None:
    eager = losses(tmp_path / "eager")
    assert losses(tmp_path / "compiled", compile_repeated_blocks=True) == pytest.approx(eager, abs=1e-3)


def test_8_bit_adam_trains(losses: Losses, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert len(set(losses(tmp_path, use_8bit_adam=True))) > 2
