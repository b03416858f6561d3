"""A toy method on the shared loop: plain denoising of keyed random latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.error import per_sample_mse
from diffalign.diffusion.random import keyed_noise, keyed_uniform
from diffalign.training.config import TrainingConfig
from diffalign.training.loop import Batches, Trainer


@dataclass
class ToyBatch:
    latents: Tensor
    noise: Tensor
    timesteps: Tensor


class ToyBatches(Batches[ToyBatch]):
    """Sample i of step s is a function of (s, i), in whichever process and micro-batch it lands."""

    samples = 32
    latent_elements = 4 * 8 * 8

    def __init__(self, trainer: ToyTrainer) -> None:
        self.trainer = trainer

    def stream(self, start_step: int, stop_step: int) -> Iterator[ToyBatch]:
        config, accelerator = self.trainer.config, self.trainer.accelerator
        shape = self.trainer.family.latent_shape(16, 16)
        size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
        for step in range(start_step, stop_step):
            for index in range(accumulation):
                first = (index * accelerator.num_processes + accelerator.process_index) * size
                ids = range(first, first + size)
                yield ToyBatch(
                    keyed_noise([(config.seed, "latents", i) for i in ids], shape),
                    keyed_noise([(config.seed, "noise", step, i) for i in ids], shape),
                    (keyed_uniform([(config.seed, "t", step, i) for i in ids]) * 1000).long(),
                )


class ToyTrainer(Trainer[TrainingConfig, ToyBatch]):
    method = "toy"
    paper = "@misc{toy}"
    poison: frozenset[int] = frozenset()
    """Steps whose loss is made NaN."""

    def make_batches(self) -> ToyBatches:
        self.text = self.family.encode_prompts(["a toy"])
        self.family.free("text_encoders")
        return ToyBatches(self)

    def compute_loss(self, batch: ToyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        x_t = self.family.noise_process.add_noise(batch.latents, batch.noise, batch.timesteps)
        text = {name: value.expand(len(x_t), *value.shape[1:]) for name, value in self.text.items()}
        pred = self.family.predict(self.policy.denoiser, x_t, batch.timesteps, text)
        loss = per_sample_mse(pred, batch.noise).mean()
        if self.step in self.poison:
            loss = loss * torch.nan
        return loss, {"error": loss}


def settings(model: str, output_dir: Path, **overrides: Any) -> TrainingConfig:
    """Six steps of the toy method, with everything on that keeps state."""
    chosen: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model),
        "output_dir": str(output_dir),
        "max_train_steps": 6,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "rank": 2,
        "lora_dropout": 0.1,
        "use_ema": True,
        "checkpointing_steps": 2,
        "report_to": ["none"],
    }
    return TrainingConfig(**{**chosen, **overrides})


@pytest.fixture
def toy_config(tiny_sdxl_path: str, tmp_path: Path) -> Any:
    """Makes a config of the toy method; keyword arguments override."""

    def make(output_dir: str | None = None, **overrides: Any) -> TrainingConfig:
        return settings(tiny_sdxl_path, Path(output_dir or tmp_path / "run"), **overrides)

    return make


@pytest.fixture
def toy_trainer() -> type[ToyTrainer]:
    return ToyTrainer


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl_path: str) -> Path:
    """The folder of six steps without a stop. Read only."""
    return ToyTrainer(settings(tiny_sdxl_path, tmp_path_factory.mktemp("whole") / "run")).train()
