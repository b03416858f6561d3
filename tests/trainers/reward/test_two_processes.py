"""Two processes are one run: the same losses, evaluations and report at the same effective batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def train(arguments: list[str], output_dir: Path, processes: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run ``diffalign train-reward``; its metrics and report."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "diffalign", "train-reward", *arguments, "--output_dir", str(output_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((output_dir / "report.json").read_text())


@pytest.mark.slow
def test_two_gloo_processes_give_the_run_of_one(bright_pairs: Path, tmp_path: Path) -> None:
    common = "--pretrained_model_name_or_path shapes-clip --train_mode full --max_train_steps 3 --eval_steps 1"
    common += " --learning_rate 1e-4 --validation_share 0.2 --heldout_share 0.3 --report_to none"
    words = [*common.split(), "--dataset_name", str(bright_pairs)]
    one, report_one = train([*words, "--train_batch_size", "4"], tmp_path / "one", 1)
    two, report_two = train([*words, "--train_batch_size", "2"], tmp_path / "two", 2)
    for name in ("loss", "margin", "grad_norm", "validation_loss", "validation_accuracy"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=1e-4), name
    assert report_two["heldout_accuracy"] == report_one["heldout_accuracy"]
    calibration = [report["calibration"]["after"]["negative_log_likelihood"] for report in (report_one, report_two)]
    assert calibration[1] == pytest.approx(calibration[0], abs=1e-3)
