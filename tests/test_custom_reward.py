"""scripts/custom_reward.py: short, right as a reward, and its commands are still those of the package."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.rewards import load_reward, registry

SCRIPT = Path(__file__).parents[1] / "scripts" / "custom_reward.py"


def test_it_is_short_and_scores() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 30
    reward = load_reward(f"{SCRIPT}:Warm")
    images = torch.tensor([[0.75, 0.5, 0.25], [0.0, 0.0, 1.0]])[:, :, None, None].expand(2, 3, 4, 4)
    images = images.clone().requires_grad_()
    scores = reward(images, grad=True).rewards
    scores.sum().backward()
    assert scores.tolist() == [0.5, -1.0] and images.grad is not None
    assert images.grad[0, :, 0, 0].tolist() == [1 / 16, 0, -1 / 16]


def test_its_three_steps_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.evaluation import grid
    from diffalign.making import pairs
    from diffalign.trainers import dpo

    seen: list[Any] = []

    class Recorder:
        def __init__(self, config: Any) -> None:
            seen.append(config)

        def train(self) -> None:
            seen.append("trained")

    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(pairs, "run_pairs", seen.append)
    monkeypatch.setattr(dpo, "DPOTrainer", Recorder)
    monkeypatch.setattr(grid, "run_grid", seen.append)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    chosen, training, trained, shown = seen
    assert (chosen.rewards, chosen.num_images_per_prompt, trained) == (["warm"], 8, "trained")
    assert training.dataset_name == chosen.output_dir and shown.models == [training.output_dir]
    assert shown.scorer == ["warm"] and load_reward("warm").name == "warm"
