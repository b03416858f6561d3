"""What only a GPU can show: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.trainers.dpo import DPOConfig, DPOTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (set CUDA_VISIBLE_DEVICES)"),
]


def losses(folder: Path, **overrides: Any) -> list[float]:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": "shapes-sdxl",
        "dataset_name": "shapes-pairs",
        "max_train_samples": 64,
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "run"),
        "max_train_steps": 4,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "beta_dpo": 500,
        "report_to": ["none"],
    }
    run = DPOTrainer(DPOConfig(**{**settings, **overrides})).train()
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_first_loss_is_ln_2_in_every_precision(tmp_path: Path, precision: str) -> None:
    table = losses(tmp_path, mixed_precision=precision)
    assert table[0] == pytest.approx(0.6931472, abs=1e-6)
    assert table[-1] != table[0]


def test_compiled_blocks_give_the_losses_of_eager_ones(tmp_path: Path) -> None:
    eager = losses(tmp_path / "eager")
    assert losses(tmp_path / "compiled", compile_repeated_blocks=True) == pytest.approx(eager, abs=1e-3)


def test_8_bit_adam_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert len(set(losses(tmp_path, use_8bit_adam=True))) > 2
