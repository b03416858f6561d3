"""Everything here needs a CUDA device: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, before tests are chosen by their marks."""
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (set CUDA_VISIBLE_DEVICES)")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(absent)


@pytest.fixture
def on_pairs() -> Callable[..., dict[str, Any]]:
    """Makes the settings of four steps on bundled pairs in a folder; keyword arguments add to them or replace."""

    def make(folder: Path, **own: Any) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": "shapes-sdxl",
            "dataset_name": "shapes-pairs",
            "max_train_samples": 64,
            "cache_dir": str(folder / "cache"),
            "output_dir": str(folder / "run"),
            "max_train_steps": 4,
            "train_batch_size": 8,
            "learning_rate": 1e-3,
            "report_to": ["none"],
            **own,
        }

    return make
