"""RG-LCD on a GPU: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.trainers.rg_lcd import RGLCDConfig, RGLCDTrainer

PROXY = {"proxy": "shapes-clip", "proxy_learning_rate": 1e-4}


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(on_pairs: Callable[..., dict[str, Any]]) -> Run:
    def train(folder: Path, **own: Any) -> list[dict[str, Any]]:
        settings = on_pairs(folder, **{"rewards": ["shapes-clip"], "reward_scale": 0.05, "w_max": 4.0, **own})
        trained = RGLCDTrainer(RGLCDConfig(**settings)).train()
        return [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]

    return train


@pytest.mark.parametrize("own", [{}, PROXY], ids=["direct", "proxy"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_it_trains_in_every_precision(run: Run, tmp_path: Path, precision: str, own: dict[str, Any]) -> None:
    table = run(tmp_path, mixed_precision=precision, gradient_checkpointing=True, decode_batch_size=4, **own)
    # Float16 may skip its first step to find its scale.
    assert all(row["skipped_steps"] <= 1 for row in table) and len({row["loss"] for row in table}) == 4
    assert ("proxy_loss" in table[0]) == bool(own)


def test_a_student_by_proxy_needs_less_memory_than_one_through_the_decoder(run: Run, tmp_path: Path) -> None:
    peaks = []
    for name, own in (("direct", {}), ("proxy", PROXY)):
        torch.cuda.reset_peak_memory_stats()
        run(tmp_path / name, train_batch_size=64, decode_batch_size=64, proxy_batch_size=8, **own)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
