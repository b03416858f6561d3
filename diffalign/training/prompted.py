"""Methods that draw images of prompts and have them scored: what RL and reward gradients share.

Prompts, sampler, rewards, and the held-out evaluation that says whether a rising reward means better images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from diffalign.data.prompts import Prompt, read_prompts
from diffalign.diffusion.steps import Steps, make_steps
from diffalign.errors import UserError
from diffalign.pipelines import Family
from diffalign.training.heldout import Heldout
from diffalign.training.judge import Judge
from diffalign.training.loop import Needs, Trainer
from diffalign.training.online_config import PromptConfig
from diffalign.training.rollout import Condition, rollout, select_text
from diffalign.training.run_log import RunLog
from diffalign.training.scoring import Scorer
from diffalign.training.steps import Batch

Config = TypeVar("Config", bound=PromptConfig)
_STATE = "prompted_state.json"
_ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class PromptNeeds(Needs):
    """What a method on prompts needs beside the policy."""

    copies: tuple[str, ...] = ()
    """Slow copies of the policy, by name."""


class PromptTrainer(Trainer[Config, Batch], Generic[Config, Batch]):
    """A method that draws images and is told how good they are."""

    needs: ClassVar[PromptNeeds] = PromptNeeds()
    scorer: Scorer

    _judge: Judge | None = None
    _nothing: dict[str, Tensor] | None = None

    def __init__(self, config: Config, family: Family | None = None) -> None:
        super().__init__(config, family)
        for name in self.copies():
            self.policy.add_copy(name)

    def copies(self) -> tuple[str, ...]:
        """The slow copies that these settings need; each takes as much memory as what trains."""
        return self.needs.copies

    @classmethod
    def frozen_passes(cls, config: Any) -> int:
        return int(cls.needs.reference) + cls.slow_copies(config)

    @classmethod
    def slow_copies(cls, config: Any) -> int:
        return len(cls.needs.copies)

    def read_prompts(self) -> None:
        """Read the prompts and make the sampler's steps; the first thing that ``make_batches`` does."""
        config = self.config
        self.prompts: list[Prompt] = read_prompts(config.prompts, limit=config.max_prompts, seed=config.seed)
        self.steps: Steps = make_steps(
            self.family.noise_process,
            self.family.scheduler_config,
            config.num_inference_steps,
            config.sampler,
            config.eta,
        )
        side = config.resolution or self.family.default_resolution
        self.latent_shape = self.family.latent_shape(side, side)

    def judge_by(self, scorer: Scorer) -> None:
        """Take the rewards, and what is held out for them to judge; before a model is loaded, and checked."""
        self.scorer = scorer
        scorer.check(self.prompts, self.config.prompts)
        if self.config.heldout_prompts:
            texts = {prompt.text for prompt in self.prompts}
            size = self.config.rollout_batch_size
            self._judge = Judge(self.config, self.accelerator, scorer, texts, self._draw_heldout, size)

    @property
    def heldout(self) -> Heldout | None:
        """The held-out evaluations, where there are any."""
        return self._judge.heldout if self._judge else None

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings of each image's prompt, on the CPU; a prompt that comes often is encoded once."""
        unique = list(dict.fromkeys(prompts))
        with torch.no_grad(), self._no_autocast():
            parts = [
                self.family.encode_prompts(unique[i : i + _ENCODED_AT_ONCE])
                for i in range(0, len(unique), _ENCODED_AT_ONCE)
            ]
        text = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        place = {prompt: i for i, prompt in enumerate(unique)}
        return select_text(text, [place[prompt] for prompt in prompts])

    def condition(self, text: Mapping[str, Tensor], guidance_scale: float | None = None) -> Condition:
        """What images are drawn for, on the device; guidance is the run's unless another is given."""
        device = self.accelerator.device
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        moved = {name: value.to(device) for name, value in text.items()}
        return Condition(moved, None if scale == 1 else self.unconditional, scale)

    @property
    def unconditional(self) -> dict[str, Tensor]:
        """What stands for no prompt, encoded once, in one precision: drawing and training must see the same."""
        if self._nothing is None:
            with torch.no_grad(), self._no_autocast():
                self._nothing = self.family.encode_unconditional()
        return self._nothing

    def _no_autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.accelerator.device.type, enabled=False)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] of latents, on the CPU, without gradient."""
        images = self.family.decode_latents(latents.to(self.accelerator.device), chunk=self.config.decode_batch_size)
        return images.cpu()

    # Judging ---------------------------------------------------------------------------------------------------

    def at_start(self, log: RunLog) -> None:
        super().at_start(log)
        if self._judge:
            self._judge.run(self.step, self.policy.export, log)

    def after_step(self, log: RunLog, metrics: Mapping[str, float]) -> None:
        if self._judge and self._judge.after_step(self.step, self.plan.steps, self.policy.export, log):
            self._end_early()

    def _end_early(self) -> None:
        """End the run here: the plan is what was done."""
        self.done = True
        self.plan = replace(self.plan, steps=self.step)

    def _draw_heldout(self, prompts: list[Prompt], seeds: list[int]) -> Tensor:
        config = self.config
        scale = config.guidance_scale if config.evaluation_guidance_scale is None else config.evaluation_guidance_scale
        steps = make_steps(
            self.family.noise_process,
            self.family.scheduler_config,
            config.evaluation_inference_steps or config.num_inference_steps,
            # A consistency model is no denoiser for another sampler.
            "lcm" if config.sampler == "lcm" else "ddim",
            eta=config.evaluation_eta,
        )
        with self.policy.ema_weights(), self.policy.evaluating(), self.accelerator.autocast(), torch.no_grad():
            given = self.condition(self.encode([p.text for p in prompts]), scale)
            denoiser = self.policy.modules[self.family.denoiser_part]
            drawn = rollout(self.family, denoiser, steps, given, seeds, self.latent_shape)
            return self.decode(drawn.latents)

    # Resuming --------------------------------------------------------------------------------------------------

    def save_extra(self, folder: Path) -> None:
        state = {
            "scorer": self.scorer.state_dict(),
            "heldout": self.heldout.state_dict() if self.heldout else None,
        }
        (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")

    def load_extra(self, folder: Path) -> None:
        if not (folder / _STATE).is_file():
            raise UserError(f"{folder} is no checkpoint of a method on prompts: {_STATE} is missing")
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.scorer.load_state_dict(state["scorer"])
        if self.heldout is not None and state["heldout"] is not None:
            self.heldout.load_state_dict(state["heldout"])
            if self.heldout.should_stop:
                self._end_early()
