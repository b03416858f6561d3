"""LCD on a GPU, where frozen weights are in half precision: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.trainers.lcd import LCDConfig, LCDTrainer


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"train_mode": "full", "unet_time_cond_proj_dim": 256}])
def test_half_precision_trains_with_losses_in_float32(
    on_pairs: Callable[..., dict[str, Any]], tmp_path: Path, precision: str, options: dict[str, Any]
) -> None:
    own = {"rank": 4, "w_min": 2.0, "w_max": 4.0, "learning_rate": 1e-4, "mixed_precision": precision, **options}
    run = LCDTrainer(LCDConfig(**on_pairs(tmp_path, **own)))
    batch = next(run.batches.stream(0, 1))
    with run.accelerator.autocast():
        distilled = run.distil(batch)
    assert distilled.student.dtype == distilled.target.dtype == distilled.losses.dtype == torch.float32
    rows = [json.loads(line) for line in (run.train() / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_steps"] == 0 and rows[-1]["loss"] != rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(float(distilled.losses.mean()), rel=1e-3)
