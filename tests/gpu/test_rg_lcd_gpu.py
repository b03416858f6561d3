"""RG-LCD on a GPU: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.trainers.rg_lcd import RGLCDConfig, RGLCDTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (set CUDA_VISIBLE_DEVICES)"),
]

PROXY = {"proxy": "shapes-clip", "proxy_learning_rate": 1e-4}


def run(folder: Path, **own: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": "shapes-sdxl",
        "dataset_name": "shapes-pairs",
        "max_train_samples": 64,
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "run"),
        "rewards": ["shapes-clip"],
        "reward_scale": 0.05,
        "max_train_steps": 4,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "w_max": 4.0,
        "report_to": ["none"],
    }
    trained = RGLCDTrainer(RGLCDConfig(**{**settings, **own})).train()
    return [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("own", [{}, PROXY], ids=["direct", "proxy"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_it_trains_in_every_precision(tmp_path: Path, precision: str, own: dict[str, Any]) -> None:
    table = run(tmp_path, mixed_precision=precision, gradient_checkpointing=True, decode_batch_size=4, **own)
    # Float16 may skip its first step to find its scale.
    assert all(row["skipped_steps"] <= 1 for row in table) and len({row["loss"] for row in table}) == 4
    assert ("proxy_loss" in table[0]) == bool(own)


def test_a_student_by_proxy_needs_less_memory_than_one_through_the_decoder(tmp_path: Path) -> None:
    peaks = []
    for name, own in (("direct", {}), ("proxy", PROXY)):
        torch.cuda.reset_peak_memory_stats()
        run(tmp_path / name, train_batch_size=64, decode_batch_size=64, proxy_batch_size=8, **own)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
