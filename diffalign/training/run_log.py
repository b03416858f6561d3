"""What a run tells while it goes: ``metrics.jsonl``, the progress bar, and the trackers."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from tqdm.auto import tqdm

from diffalign.config import to_dict
from diffalign.errors import UserError
from diffalign.training.config import RunConfig

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_BAR = {
    "loss": "loss",
    "reward": "reward",
    "implicit_accuracy": "acc",
    "validation_accuracy": "val",
    "margin": "margin",
    "chosen_error_vs_reference": "chosen",
    "rejected_error_vs_reference": "rejected",
    "learning_rate": "lr",
}


def tracker_names(report_to: list[str]) -> list[str]:
    """The trackers to start: "auto" is TensorBoard where it is installed, "none" is nothing."""
    names: list[str] = []
    for name in report_to:
        if name == "auto":
            names += ["tensorboard"] if is_tensorboard_available() else []
        elif name != "none":
            names.append(name)
    return names


class RunLog:
    """Writes one row a step. Only the main process writes; on the others every call does nothing.

    Args:
        output_dir: the run's folder.
        total_steps: optimiser steps of the run.
        start_step: steps done before (rows of later steps, from a run that went further, are removed).
    """

    def __init__(
        self, accelerator: Accelerator, config: RunConfig, output_dir: Path, total_steps: int, start_step: int
    ) -> None:
        self.accelerator = accelerator
        self.path = output_dir / METRICS_FILE
        self.enabled = accelerator.is_main_process
        if self.enabled:
            _drop_rows_after(self.path, start_step)
        if accelerator.log_with:
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in to_dict(config).items()}
            try:
                accelerator.init_trackers(Path(output_dir).name, config=plain)
            except (ImportError, ValueError) as error:
                raise UserError(f"report_to {config.report_to}: the tracker could not start: {error}") from error
        self.bar = tqdm(total=total_steps, initial=start_step, desc="train", disable=not self.enabled, unit="step")

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; ``step`` counts from 1. What is not finite is written as null."""
        if not self.enabled:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, **plain})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        shown = {short: f"{metrics[name]:.4g}" for name, short in _BAR.items() if name in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        if self.accelerator.trackers:
            self.accelerator.log(dict(metrics), step=step)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.enabled:
            tqdm.write(message)

    def close(self) -> None:
        """Finish the bar, the trackers and the process group: nothing collective can follow."""
        self.bar.close()
        self.accelerator.end_training()


def _drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows up to ``step``: a resumed run writes the later ones again. A half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: dropped a half-written line: %.60s", path, line)
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
