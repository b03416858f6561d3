"""Judging a run on prompts, and by rewards, that it does not train on.

The reward that is trained rises; whether the images get better is what a held-out judge says. The same prompts with
the same seeds are drawn again and again, without sampling noise, so that evaluations are compared prompt by prompt.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import UserError
from diffalign.evaluation.stats import paired_difference
from diffalign.training.online_config import PromptConfig

logger = logging.getLogger(__name__)

FILE = "heldout.jsonl"
BEST = "best"

Draw = Callable[[list[Prompt], list[int]], Tensor]
"""Prompts and seeds of this process -> images (N, 3, H, W) in [0, 1], CPU."""


class Heldout:
    """Evaluations of a run, the best of them, and when to stop.

    Args:
        config: of the run.
        trained: texts of the prompts it trains on; held-out ones among them are left out.
    """

    def __init__(self, config: PromptConfig, trained: set[str]) -> None:
        assert config.heldout_prompts is not None
        self.config = config
        found = read_prompts(config.heldout_prompts, limit=config.num_heldout_prompts)
        self.prompts = [prompt for prompt in found if prompt.text not in trained]
        if not self.prompts:
            raise UserError(
                f"heldout_prompts {config.heldout_prompts}: all {len(found)} are prompts that are trained on"
            )
        if len(self.prompts) < len(found):
            logger.warning("%d held-out prompts are trained on and left out", len(found) - len(self.prompts))
        self.history: list[dict[str, Any]] = []
        self.worse_in_a_row = 0

    def due(self, step: int, total: int) -> bool:
        """Whether to judge after ``step`` steps of ``total``."""
        return step % self.config.evaluation_steps == 0 or step == total

    def add(self, step: int, trained: Tensor, judges: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> bool:
        """Take in an evaluation; returns whether it is the best so far.

        Args:
            step: optimiser steps done.
            trained: combined trained reward of each prompt, (N,).
            judges: held-out rewards by name, each (N,); where there are none, the trained reward judges.
            raw: all rewards by name.
        """
        judged = torch.stack([standard(values) for values in judges.values()]).mean(0) if len(judges) > 1 else None
        scores = judged if judged is not None else next(iter(judges.values()), trained)
        row = {
            "step": step,
            "trained": trained.tolist(),
            "judge": scores.tolist(),
            "means": {name: float(values.double().mean()) for name, values in raw.items()},
        }
        best = self.best
        self.history = [r for r in self.history if r["step"] < step] + [row]
        self.worse_in_a_row = self.worse_in_a_row + 1 if best is not None and self._over_optimised(row, best) else 0
        return self.best is row

    def _over_optimised(self, row: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
        """The trained reward is above what it was at the best evaluation, the judge's significantly below."""
        up = sum(row["trained"]) > sum(best["trained"])
        return up and paired_difference(row["judge"], best["judge"]).high < 0

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation that the judge likes most."""
        return max(self.history, key=lambda row: sum(row["judge"]), default=None)

    @property
    def should_stop(self) -> bool:
        return self.config.early_stop and self.worse_in_a_row >= self.config.early_stop_patience

    def report(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of ``heldout.jsonl``: means, and the change since step 0 with its interval."""
        first = self.history[0]
        change = {
            name: [round(x, 6) for x in (d.mean, d.low, d.high)]
            for name in ("trained", "judge")
            for d in [paired_difference(row[name], first[name])]
        }
        means = {f"heldout/{name}": mean for name, mean in row["means"].items()}
        return {"step": row["step"], **means, "change_since_start": change, "best_step": (self.best or row)["step"]}

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as JSON knows it."""
        return {"history": self.history, "worse_in_a_row": self.worse_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read back what :meth:`state_dict` gave."""
        self.history, self.worse_in_a_row = list(state["history"]), state["worse_in_a_row"]


def standard(values: Tensor) -> Tensor:
    """Values over their own spread, so that judges of different units can be averaged: (N,) to (N,)."""
    return values / values.std(correction=0).clamp(min=1e-6)


def append_row(path: Path, row: Mapping[str, Any], step: int) -> None:
    """Add a row to a JSONL file, dropping rows of later or equal steps that an earlier run left."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = [other for other in rows if other["step"] < step]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(r) + "\n" for r in [*kept, row]), encoding="utf-8")
    os.replace(aside, path)


def keep_best(folder: Path, export: Callable[[Path], Any], step: int) -> None:
    """Write the policy as the best so far: complete, or the one before."""
    aside, final = folder / f".{BEST}", folder / BEST
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    export(aside)
    (aside / "step.json").write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
