"""Going on from a LoRA, against the base model or against the LoRA itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.pipelines import load_family
from diffalign.trainers.dpo import DPOConfig, DPOTrainer


@pytest.fixture(scope="module")
def lora(tiny_sd_path: str, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 trained for two steps."""
    folder = tmp_path_factory.mktemp("lora")
    DPOTrainer(config(tiny_sd_path, pairs_folder, folder, max_train_steps=2, learning_rate=1e-2)).train()
    return folder


def config(model: str, pairs: Path, folder: Path, **settings: Any) -> DPOConfig:
    values = {"resolution": 32, "rank": 2, "max_train_steps": 1, "report_to": ["none"], "checkpointing_steps": 1}
    values |= {"cache_dir": str(folder / "cache"), "output_dir": str(folder), "train_batch_size": 2}
    return DPOConfig(pretrained_model_name_or_path=model, dataset_name=str(pairs), **(values | settings))


def predict(trainer: DPOTrainer, denoiser: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, 16, generator=generator)
    result: Tensor = denoiser(x, torch.tensor([10, 500]), text).sample.detach()
    return result


def three(trainer: DPOTrainer) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of policy, reference and base."""
    trainer.policy.family.denoiser.eval()
    policy = predict(trainer, trainer.policy.denoiser)
    with trainer.policy.reference() as denoiser:
        reference = predict(trainer, denoiser)
    with trainer.policy.base() as denoiser:
        base = predict(trainer, denoiser)
    return policy, reference, base


@pytest.mark.parametrize("against", ["base", "start"])
def test_policy_starts_at_the_lora(
    against: str, lora: Path, tiny_sd_path: str, pairs_folder: Path, tmp_path: Path
) -> None:
    settings = {"initial_lora": str(lora), "reference": against}
    trainer = DPOTrainer(config(tiny_sd_path, pairs_folder, tmp_path, **settings))
    policy, reference, base = three(trainer)
    family = load_family(tiny_sd_path)
    assert torch.equal(base, predict(trainer, family.denoiser))
    assert not torch.equal(policy, base)
    assert torch.equal(reference, policy if against == "start" else base)
    plain, _, plain_base = three(DPOTrainer(config(tiny_sd_path, pairs_folder, tmp_path / "plain")))
    assert torch.equal(plain, plain_base)


def test_the_reference_stays_while_the_policy_trains_and_after_a_resume(
    lora: Path, tiny_sd_path: str, pairs_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"initial_lora": str(lora), "reference": "start", "learning_rate": 1e-2}
    trainer = DPOTrainer(config(tiny_sd_path, pairs_folder, tmp_path, **settings))
    start, _, _ = three(trainer)
    trainer.train()
    after, reference, _ = three(trainer)
    assert not torch.equal(after, start) and torch.equal(reference, start)
    settings |= {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    resumed = DPOTrainer(config(tiny_sd_path, pairs_folder, tmp_path, **settings))
    resumed._resume()
    again, reference_again, _ = three(resumed)
    assert torch.equal(again, after) and torch.equal(reference_again, start)


def test_another_rank_or_a_full_fine_tune_is_refused(
    lora: Path, tiny_sd_path: str, pairs_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="does not fit"):
        DPOTrainer(config(tiny_sd_path, pairs_folder, tmp_path, initial_lora=str(lora), rank=4))
    with pytest.raises(UserError, match="train_mode lora"):
        config(tiny_sd_path, pairs_folder, tmp_path, initial_lora=str(lora), train_mode="full")
