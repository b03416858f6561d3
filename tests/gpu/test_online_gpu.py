"""Methods on rewards on a GPU: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.trainers import load_method

ROLLOUT = {"num_prompts_per_rollout": 2, "num_images_per_prompt": 4, "rollout_batch_size": 8, "advantage": "group"}


def rows(method: str, folder: Path, **own: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": "shapes-sdxl",
        "prompts": "shapes-train",
        "rewards": ["shapes-clip"],
        "output_dir": str(folder / "run"),
        "num_inference_steps": 5,
        "max_train_steps": 2,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "checkpointing_steps": 0,
        "report_to": ["none"],
    }
    config_class, trainer_class = load_method(method)
    run = trainer_class(config_class(**{**settings, **own})).train()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("precision", "bound"), [("no", 1e-6), ("bf16", 1e-4), ("fp16", 1e-4)])
def test_the_ratio_is_one_before_the_first_update(tmp_path: Path, precision: str, bound: float) -> None:
    assert all(row["log_ratio_error"] <= bound for row in rows("ddpo", tmp_path, mixed_precision=precision, **ROLLOUT))


@pytest.mark.parametrize("method", ["awm", "nft", "rwr"])
def test_methods_on_the_forward_process_in_bf16(tmp_path: Path, method: str) -> None:
    table = rows(method, tmp_path, mixed_precision="bf16", gradient_checkpointing=True, **ROLLOUT)
    assert all(row["grad_norm"] > 0 for row in table)
    # What it is pulled to stands still while it learns.
    assert all(table[-1][name] > 0 for name in ("distance_to_old", "distance_to_ema") if name in table[-1])


def test_reward_gradients_in_bf16(tmp_path: Path) -> None:
    table = rows("reward_gradient", tmp_path, mixed_precision="bf16", gradient_checkpointing=True, gradient_steps=2)
    assert all(row["grad_norm"] > 0 for row in table)
