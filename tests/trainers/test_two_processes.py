"""Two processes are one run: the same losses at the same effective batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def train(method: str, arguments: list[str], output_dir: Path, processes: int) -> list[dict[str, Any]]:
    """Run ``diffalign train`` and return its metrics."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "diffalign", "train", method, *arguments, "--output_dir", str(output_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "own", "compared"),
    [
        ("dpo", {"beta_dpo": 500}, ("margin", "chosen_error")),
        # kl is estimated on the images of both processes, or the losses would differ from the second step on.
        ("kto", {"beta_kto": 100, "kl_ema_decay": 0.5}, ("kl", "liked_gain", "right_side")),
    ],
)
def test_two_gloo_processes_give_the_losses_of_one(
    tiny_sdxl_path: str,
    pairs_folder: Path,
    tmp_path: Path,
    method: str,
    own: dict[str, Any],
    compared: tuple[str, ...],
) -> None:
    def arguments(batch: int) -> list[str]:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": tiny_sdxl_path,
            "dataset_name": pairs_folder,
            "cache_dir": tmp_path / f"cache-{batch}",
            "resolution": 16,
            "max_train_steps": 4,
            "train_batch_size": batch,
            "learning_rate": 1e-3,
            "rank": 2,
            "checkpointing_steps": 2,
            "report_to": "none",
            **own,
        }
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    one = train(method, arguments(4), tmp_path / "one", 1)
    two = train(method, arguments(2), tmp_path / "two", 2)
    assert len({row["loss"] for row in one}) > 2, "the losses must move, or the comparison shows nothing"
    for name in ("loss", "grad_norm", *compared):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], abs=1e-4), name
