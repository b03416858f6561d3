"""Judging a run on prompts, and by rewards, that it does not train on.

The reward that is trained rises; whether the images get better is what a held-out judge says. The same prompts with
the same seeds are drawn again and again, without sampling noise or with the same, so that evaluations are compared
prompt by prompt.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.prompts import read_prompts
from diffalign.errors import UserError
from diffalign.evaluation.stats import PairedDifference, paired_difference
from diffalign.training.online_config import JudgedConfig

logger = logging.getLogger(__name__)

FILE = "heldout.jsonl"
BEST = "best"

Row = Mapping[str, Any]
Total = Callable[[Mapping[str, Tensor]], Tensor]


class Heldout:
    """Evaluations of a run, the best of them, and when to stop.

    Args:
        config: of the run.
        trained: texts of the prompts it trains on; held-out ones among them are left out.
        total: scores of all rewards by name, each (N,) -> the trained reward (N,), by what is known of rewards now;
            running statistics move, and evaluations must be compared in one unit.
        judges: names of the held-out rewards; where there are none, the trained reward judges.

    Raises:
        UserError: no prompts are left, or an early stop without a held-out reward.
    """

    def __init__(self, config: JudgedConfig, trained: set[str], total: Total, judges: Sequence[str]) -> None:
        assert config.heldout_prompts is not None
        if config.early_stop and not judges:
            raise UserError(
                "early_stop needs a reward that is not trained on to judge by: add one to rewards, such as "
                "{reward: NAME, eval_only: true}"
            )
        self.config, self.total, self.judges = config, total, list(judges)
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

    def add(self, step: int, raw: Mapping[str, Tensor]) -> bool:
        """Take in an evaluation; returns whether it is the best so far.

        Args:
            step: optimiser steps done.
            raw: all rewards by name, each (N,); NaN where an image could not be scored.
        """
        row = {"step": step, "raw": {name: _plain(values) for name, values in raw.items()}}
        self.history = [r for r in self.history if r["step"] < step]
        best = self.best
        self.history.append(row)
        self.worse_in_a_row = self.worse_in_a_row + 1 if best is not None and self._over_optimised(row, best) else 0
        return self.best is row

    def _over_optimised(self, row: Row, best: Row) -> bool:
        """The trained reward is above what it was at the best evaluation, the judge's significantly below.

        The best of E evaluations is partly luck, so the interval is that of E comparisons (Bonferroni).
        """
        trained = self._change(self.trained, row, best)
        judged = self._change(self.judge, row, best, 1 - 0.05 / len(self.history))
        return trained is not None and judged is not None and trained.mean > 0 and judged.high < 0

    def trained(self, row: Row) -> Tensor:
        """The trained reward of an evaluation's images, (N,)."""
        return self.total({name: _tensor(values) for name, values in row["raw"].items()})

    def judge(self, row: Row) -> Tensor:
        """What an evaluation is judged by, (N,): the held-out rewards, each over its first spread."""
        if not self.judges:
            return self.trained(row)
        first = self.history[0]["raw"] if self.history else row["raw"]
        values = [(_tensor(row["raw"][name]), _tensor(first[name])) for name in self.judges]
        if len(values) == 1:
            return values[0][0]
        return torch.stack([score / _spread(start) for score, start in values]).mean(0)

    def _change(
        self, by: Callable[[Row], Tensor], row: Row, other: Row, confidence: float = 0.95
    ) -> PairedDifference | None:
        """Over the prompts that have a score in both; None where there is none, as before any running statistics."""
        a, b = by(row), by(other)
        both = torch.isfinite(a) & torch.isfinite(b)
        return paired_difference(a[both].numpy(), b[both].numpy(), confidence=confidence) if both.any() else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation that the judge likes most."""
        return max(self.history, key=lambda row: float(self.judge(row).nanmean().nan_to_num(-torch.inf)), default=None)

    @property
    def should_stop(self) -> bool:
        return self.config.early_stop and self.worse_in_a_row >= self.config.early_stop_patience

    def means(self, row: Row) -> dict[str, float]:
        """Of each reward, over the images that have a score."""
        return {name: float(_tensor(values).nanmean()) for name, values in row["raw"].items()}

    def report(self, row: Row) -> dict[str, Any]:
        """A row of ``heldout.jsonl``: means, and the change since step 0 with its interval."""
        change = {
            name: d and [round(x, 6) for x in (d.mean, d.low, d.high)]
            for name, by in (("trained", self.trained), ("judge", self.judge))
            for d in [self._change(by, row, self.history[0])]
        }
        means = {f"heldout/{name}": mean if math.isfinite(mean) else None for name, mean in self.means(row).items()}
        return {"step": row["step"], **means, "change_since_start": change, "best_step": (self.best or row)["step"]}

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as JSON knows it."""
        return {"history": self.history, "worse_in_a_row": self.worse_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read back what :meth:`state_dict` gave."""
        self.history, self.worse_in_a_row = list(state["history"]), state["worse_in_a_row"]


def _plain(values: Tensor) -> list[float | None]:
    """For JSON, which knows no NaN."""
    return [value if math.isfinite(value) else None for value in values.double().tolist()]


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _spread(values: Tensor) -> Tensor:
    """Standard deviation of what is known, never 0: so that judges of different units can be averaged."""
    return values[torch.isfinite(values)].std(correction=0).clamp(min=1e-6)


def append_row(path: Path, row: Mapping[str, Any], step: int) -> None:
    """Add a row to a JSONL file, dropping rows of later or equal steps that an earlier run left."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = [other for other in rows if other["step"] < step]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(r) + "\n" for r in [*kept, row]), encoding="utf-8")
    os.replace(aside, path)


def keep_best(folder: Path, export: Callable[[Path], Any], step: int) -> None:
    """Write the policy as the best so far, aside first: what is called ``best`` is complete.

    The one before is deleted when the new one is in its place; what a run killed between the two left is put back.
    """
    aside, final, before = folder / f".{BEST}", folder / BEST, folder / f".{BEST}-before"
    if before.exists() and not final.exists():
        os.replace(before, final)
    for left in (aside, before):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    export(aside)
    (aside / "step.json").write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
    if final.exists():
        os.replace(final, before)
    os.replace(aside, final)
    shutil.rmtree(before, ignore_errors=True)
