"""Preference pairs for the methods' end-to-end tests."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def png(rng: np.random.Generator, size: tuple[int, int] = (24, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs in a JSONL folder, one of them a tie. Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    lines = []
    for index in range(10):
        for side in ("chosen", "rejected"):
            (folder / f"{side}-{index}.png").write_bytes(png(rng))
        label = 0.5 if index == 3 else 1.0
        files = {side: f"{side}-{index}.png" for side in ("chosen", "rejected")}
        lines.append({"prompt": f"toy {index}", **files, "label": label})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def pair_settings(tiny_sdxl_path: str, pairs_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes the settings of three steps of a method on pairs; keyword arguments override."""

    def make(**overrides: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_sdxl_path),
            "dataset_name": str(pairs_folder),
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "run"),
            "resolution": 16,
            "max_train_steps": 3,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "rank": 2,
            "report_to": ["none"],
        }
        return {**settings, **overrides}

    return make


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[[list[dict[str, object]]], Path]:
    """Writes a JSONL folder of rows that may use the pictures a.png and b.png."""

    def write(rows: list[dict[str, object]]) -> Path:
        folder = tmp_path / "own-pairs"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(png(rng))
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


ONLINE_REWARDS = """
import torch
from diffalign.rewards import Reward

def red(images, prompts, metadata):
    return images[:, 0].flatten(1).mean(1)

def blue(images, prompts, metadata):
    return -images[:, 0].flatten(1).mean(1)

def broken(images, prompts, metadata):
    raise RuntimeError("the scorer is down")

def wanted(images, prompts, metadata):
    return images.flatten(1).mean(1) * torch.tensor([float(row["sign"]) for row in metadata])

class Red(Reward):
    name = "red"
    differentiable = True

    def score(self, images, prompts, metadata):
        return images[:, 0].flatten(1).mean(1)

class Signed(Red):
    name = "signed"
    required_metadata = ("sign",)
"""


@pytest.fixture
def online_settings(tiny_sdxl_path: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes the settings of four updates on two rollouts of eight images."""
    (tmp_path / "rewards.py").write_text(ONLINE_REWARDS)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green star\n")

    def make(**overrides: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "pretrained_model_name_or_path": tiny_sdxl_path,
            "output_dir": str(tmp_path / "run"),
            "prompts": str(tmp_path / "prompts.txt"),
            "rewards": [f"{tmp_path}/rewards.py:red"],
            "resolution": 16,
            "num_prompts_per_rollout": 2,
            "num_images_per_prompt": 4,
            "num_updates_per_rollout": 2,
            "rollout_batch_size": 4,
            "train_batch_size": 4,
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "rank": 2,
            "checkpointing_steps": 2,
            "report_to": ["none"],
        }
        return {**chosen, **overrides}

    return make
