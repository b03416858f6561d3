"""The loop that every method shares.

A method says what it needs (:class:`Needs`), how its batches come about (:meth:`Trainer.make_batches`) and what its
loss is (:meth:`Trainer.compute_loss`). Everything else is here and in :mod:`diffalign.training.steps`: the policy,
EMA, validation images, the exported weights; accumulation, clipping, checkpoints, exact resume, logging.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from diffalign.errors import DiffalignError, UserError
from diffalign.estimation.work import Work
from diffalign.pipelines import Family, load_family
from diffalign.training.config import TrainingConfig
from diffalign.training.dry_run import try_out
from diffalign.training.fitting import explain
from diffalign.training.model_card import write_model_card
from diffalign.training.policy import Policy
from diffalign.training.run_log import RunLog
from diffalign.training.sharding import gathered, scattered
from diffalign.training.steps import Batch, Batches, Plan, StepLoop, StopAsked, Stopped
from diffalign.training.summary import summarise
from diffalign.training.validation import Sampling, Validation
from diffalign.training.work import offline_work

__all__ = ["DTYPES", "Batch", "Batches", "Config", "Needs", "Plan", "StopAsked", "Stopped", "Trainer"]

Config = TypeVar("Config", bound=TrainingConfig)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Needs:
    """What a method's loss needs beside the policy; the loop provides it."""

    reference: bool = False
    policy_passes: int = 1
    """Samples through the policy for each sample of a batch: a pair costs 2."""


class Trainer(StepLoop[Config, Batch]):
    """Runs a method. ``Trainer(config).train()`` is all a caller needs.

    Args:
        config: the run.
        family: the model, where it is loaded already; by default ``config.pretrained_model_name_or_path``.
    """

    needs: ClassVar[Needs] = Needs()
    paper: ClassVar[str]
    """BibTeX of the method's paper, for the model card."""
    _whole_state: dict[str, Any] | None = None
    usual_causes = ", a VAE that overflows in fp16, or bad cached latents"

    def __init__(self, config: Config, family: Family | None = None) -> None:
        if config.method not in (None, self.method):
            raise UserError(
                f"these settings are for the method {config.method}, and {self.method} was to run. Change method: "
                f"{config.method} to method: {self.method} (or remove it), or run {config.method}."
            )
        config.method = self.method
        super().__init__(config)
        self.family = family or load_family(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            vae=config.pretrained_vae_model_name_or_path,
            # Weights that train stay in float32, and so does their frozen copy: at the start both must be equal.
            dtype=DTYPES[config.mixed_precision] if config.train_mode == "lora" else torch.float32,
            device=self.accelerator.device,
            quantize=config.quantize_base,
            offload_idle=config.offload_idle,
        )
        self.batches = self.make_batches()
        self.policy = Policy(self.family, config, self.accelerator, self.needs_reference(config))
        self.make_optimizer()
        self.validation = Validation(
            config, self.policy, self.accelerator, self.output_dir, self.sampling(), self.base_sampling()
        )

    @classmethod
    def work(cls, config: Any, processes: int = 1) -> Work:
        """What a run will do on each of so many processes, for `diffalign estimate`. By default that of a method that
        learns from images on disk. ``config`` is the method's own."""
        return offline_work(
            config,
            passes=cls.needs.policy_passes,
            frozen_passes=cls.frozen_passes(config),
            needs_reference=cls.needs_reference(config),
            copies=cls.slow_copies(config),
        )

    @classmethod
    def needs_reference(cls, config: Any) -> bool:
        """Whether these settings need a reference, for which a full fine-tune keeps a frozen copy of the model."""
        return cls.needs.reference

    @classmethod
    def frozen_passes(cls, config: Any) -> int:
        """Forward passes without gradient beside each one of the policy's: the reference's, slow copies'."""
        return int(cls.needs.reference)

    @classmethod
    def slow_copies(cls, config: Any) -> int:
        """Slow copies of the trained weights that a run keeps, its EMA apart."""
        return 0

    @abstractmethod
    def make_batches(self) -> Batches[Batch]:
        """Read the data and make it ready. Called before the policy is made, so VAE and text encoders can be freed."""

    def facts(self) -> Mapping[str, str]:
        """What a method wants said at the start of a run, such as the meaning of its beta."""
        return {}

    def sampling(self) -> Sampling:
        """How the result is drawn, in validation and by who reads the model card."""
        return Sampling.of(self.config)

    def base_sampling(self) -> Sampling:
        """How the base model is drawn that validation images are shown beside."""
        return self.sampling()

    def summary(self) -> str:
        return summarise(self.config, self.plan, self.policy, self.facts())

    def parameters(self) -> Sequence[nn.Parameter]:
        return list(self.policy.parameters.values())

    def prepared(self) -> Sequence[nn.Module]:
        # Where weights are shared out, so are gradients after each micro-batch: whole ones would have to be kept.
        return [] if self.policy.sharded else list(self.policy.prepared.values())

    def try_out(self) -> bool:
        config = self.config
        wanted = config.check_first if config.check_first is not None else self.accelerator.device.type == "cuda"
        if wanted or config.dry_run:
            said = try_out(self)
            if self.accelerator.is_main_process:
                print(said)
        return config.dry_run

    def out_of_memory(self, phase: str) -> DiffalignError:
        device, processes = self.accelerator.device, self.accelerator.num_processes
        return explain(self.config, lambda config: self.work(config, processes), phase, device)

    def at_start(self, log: RunLog) -> None:
        self._validate(log)

    def after_saving(self, log: RunLog) -> None:
        if self.validation.due(self.step, self.plan.steps):
            self._validate(log)

    def after_update(self) -> None:
        self.policy.update_ema()

    def _validate(self, log: RunLog) -> None:
        if path := self.validation.run(self.step):
            log.say(f"step {self.step}: validation images in {path}")

    def counters(self) -> dict[str, Any]:
        ema = self.policy.ema
        return {**super().counters(), "ema_steps": ema.optimization_step if ema else 0}

    def gather(self) -> None:
        self.policy.gather()
        if self.policy.sharded:
            self._whole_state = gathered(self.optimizer.state_dict(), self.accelerator.is_main_process)

    def release(self) -> None:
        self.policy.release()
        self._whole_state = None

    def optimizer_state(self) -> dict[str, Any]:
        return super().optimizer_state() if self._whole_state is None else self._whole_state

    def load_optimizer(self, state: dict[str, Any]) -> None:
        super().load_optimizer(scattered(state, self.parameters()) if self.policy.sharded else state)

    def save_weights(self, folder: Path) -> None:
        self.policy.save_state(folder)
        if self.config.train_mode == "lora":
            self.policy.export(folder)

    def load_weights(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.policy.load_state(folder, dict(state))

    def export(self) -> None:
        self.policy.export(self.output_dir, comfyui=self.config.save_comfyui_lora)
        write_model_card(self.config, self.method, self.paper, self.plan, self.output_dir, self.sampling())
