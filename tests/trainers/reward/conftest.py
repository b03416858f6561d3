"""Pairs that are easy to learn, and runs on the bundled CLIP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.trainers.reward.config import RewardTrainingConfig

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond")


@pytest.fixture(scope="session")
def bright_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs over 24 prompts in a JSONL folder: the brighter picture is preferred; 6 ties. Read only."""
    folder = tmp_path_factory.mktemp("bright")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(48):
        prompt = f"a {COLORS[index % 6]} {SHAPES[index % 24 // 6]}"
        for side, level in (("chosen", 190), ("rejected", 60)):
            pixels = (level + rng.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{side}-{index}.png")
        files = {side: f"{side}-{index}.png" for side in ("chosen", "rejected")}
        label = 0.5 if index % 8 == 7 else 1.0
        rows.append({"prompt": prompt, **files, "label": label, "user_id": f"user {index % 3}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def reward_config(bright_pairs: Path, tmp_path: Path) -> Callable[..., RewardTrainingConfig]:
    """Makes the config of a short run; keyword arguments override."""

    def make(output_dir: str | Path | None = None, **overrides: Any) -> RewardTrainingConfig:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": "shapes-clip",
            "dataset_name": str(bright_pairs),
            "output_dir": str(output_dir or tmp_path / "run"),
            "train_mode": "head",
            "max_train_steps": 6,
            "train_batch_size": 4,
            "learning_rate": 1e-2,
            "validation_share": 0.25,
            "heldout_share": 0.25,
            "eval_steps": 3,
            "checkpointing_steps": 3,
            "report_to": ["none"],
        }
        return RewardTrainingConfig(**{**settings, **overrides})

    return make
