"""A run's held-out evaluations: drawing, scoring, keeping the best weights, saying when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.data.prompts import Prompt
from diffalign.training.heldout import BEST, FILE, Heldout, append_row, keep_best
from diffalign.training.online_config import JudgedConfig
from diffalign.training.run_log import RunLog
from diffalign.training.scoring import Scorer, pad_and_gather

Draw = Callable[[list[Prompt], list[int]], Tensor]
"""Images (B, 3, H, W) in [0, 1], CPU, of prompts with their seeds, by the policy as it would be exported."""


class Judge:
    """Draws the held-out prompts of a run, scores them by every reward and keeps the policy that is best so far.

    Args:
        config: of the run; has ``heldout_prompts``.
        accelerator: the prompts are spread over its processes.
        scorer: of the run.
        trained: texts of the prompts that are trained on.
        draw: draws a batch.
        batch_size: of ``draw``.

    Raises:
        UserError: see :class:`Heldout`; or a reward cannot judge a prompt.
    """

    def __init__(
        self,
        config: JudgedConfig,
        accelerator: Accelerator,
        scorer: Scorer,
        trained: set[str],
        draw: Draw,
        batch_size: int,
    ) -> None:
        assert config.heldout_prompts is not None
        self.accelerator, self.scorer = accelerator, scorer
        self.folder = Path(config.output_dir)
        self.draw, self.batch_size = draw, batch_size
        self.heldout = Heldout(config, trained, self._total, scorer.judges)
        scorer.check(self.heldout.prompts, config.heldout_prompts)

    def _total(self, raw: Mapping[str, Tensor]) -> Tensor:
        return self.scorer.total(raw, self.heldout.prompts)

    def after_step(self, step: int, last: int, export: Callable[[Path], Any], log: RunLog) -> bool:
        """Judge if it is time to; returns whether the run should end here."""
        if not self.heldout.due(step, last):
            return False
        self.run(step, export, log)
        if self.heldout.should_stop:
            log.say(
                f"step {step}: the trained reward went on rising while the held-out one fell significantly "
                f"{self.heldout.worse_in_a_row} evaluations in a row: stopped. The best weights, of step "
                f"{(self.heldout.best or {})['step']}, are in {self.folder / BEST}."
            )
        return self.heldout.should_stop

    def run(self, step: int, export: Callable[[Path], Any], log: RunLog) -> None:
        """Judge now. Every process must call it.

        Args:
            step: optimiser steps done.
            export: writes the policy into a folder.
            log: of the run.
        """
        prompts = self.heldout.prompts
        mine = range(self.accelerator.process_index, len(prompts), self.accelerator.num_processes)
        table = pad_and_gather(self.accelerator, mine, self._scores(list(mine)), len(prompts))
        # The same table on every process, so that all of them agree on what is best and when to stop.
        is_best = self.heldout.add(step, dict(zip(self.scorer.rewards.names, table.unbind(1), strict=True)))
        if self.accelerator.is_main_process:
            row = self.heldout.history[-1]
            append_row(self.folder / FILE, self.heldout.report(row), step)
            means = ", ".join(f"{name} {value:.4g}" for name, value in self.heldout.means(row).items())
            log.say(f"step {step}: held-out {means}{' (best so far)' if is_best else ''}")
            if is_best:
                keep_best(self.folder, export, step)
        self.accelerator.wait_for_everyone()

    def _scores(self, places: list[int]) -> Tensor:
        """Scores of held-out images, (len(places), rewards)."""
        parts = [torch.zeros(0, len(self.scorer.rewards.names), dtype=torch.float64)]  # More processes than prompts.
        for start in range(0, len(places), self.batch_size):
            seeds = places[start : start + self.batch_size]
            chosen = [self.heldout.prompts[i] for i in seeds]
            parts.append(self.scorer.judge(self.draw(chosen, seeds), chosen, seeds))
        return torch.cat(parts)
