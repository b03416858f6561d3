"""Diffusion-DPO end to end on a tiny SDXL pipeline: data in, LoRA out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from diffalign.errors import UserError
from diffalign.evaluation.draw import sample_images
from diffalign.trainers.dpo import DPOConfig, DPOTrainer

LN2 = torch.tensor(math.log(2), dtype=torch.float32).item()


@pytest.fixture
def dpo_config(pair_settings: Any) -> Any:
    return lambda **overrides: DPOConfig(**pair_settings(**overrides))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_first_loss_is_ln_2_and_then_it_moves(dpo_config: Any) -> None:
    table = rows(DPOTrainer(dpo_config()).train())
    assert table[0]["loss"] == LN2
    assert table[0]["implicit_accuracy"] == 0.5 and table[0]["margin"] == 0.0
    assert table[1]["loss"] != LN2 and table[1]["margin"] != 0.0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_full_fine_tuning_starts_at_ln_2_against_its_frozen_copy(dpo_config: Any, precision: str) -> None:
    trainer = DPOTrainer(dpo_config(train_mode="full", learning_rate=1e-3, mixed_precision=precision))
    stored = UNet2DConditionModel.from_pretrained(trainer.config.pretrained_model_name_or_path, subfolder="unet")
    trained = trainer.policy.parameters
    assert all(torch.equal(p, trained[f"unet.{name}"]) for name, p in stored.named_parameters()), "rounded to bf16"
    table = rows(trainer.train())
    assert table[0]["loss"] == LN2 and table[1]["loss"] != LN2


def test_with_caches_neither_vae_nor_text_encoders_are_in_memory(dpo_config: Any) -> None:
    seen = []

    class Watched(DPOTrainer):
        def compute_loss(self, batch: Any) -> Any:
            seen.append(self.family.loaded)
            return super().compute_loss(batch)

    Watched(dpo_config(validation_prompts=["toy"], validation_steps=1, validation_inference_steps=1)).train()
    assert set(seen) == {frozenset({"denoiser"})}


def test_encoding_on_the_fly_gives_the_losses_of_the_cache(dpo_config: Any, tmp_path: Path) -> None:
    # The VAE encodes batches of another size here; a small beta keeps its rounding from being multiplied by 2500.
    cached = rows(DPOTrainer(dpo_config(beta_dpo=200)).train())
    live = rows(DPOTrainer(dpo_config(beta_dpo=200, cache_latents=False, output_dir=str(tmp_path / "live"))).train())
    assert [r["loss"] for r in live] == pytest.approx([r["loss"] for r in cached], abs=1e-4)


def test_the_lora_draws_the_same_images_in_plain_diffusers(dpo_config: Any, tiny_sdxl_path: str) -> None:
    trainer = DPOTrainer(dpo_config())
    run = trainer.train()
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16}
    ours = sample_images(trainer.family.pipeline(), ["toy"], [7], **settings)[0]
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_path)
    base = sample_images(pipe, ["toy"], [7], **settings)[0]
    pipe.load_lora_weights(str(run))
    theirs = sample_images(pipe, ["toy"], [7], **settings)[0]
    assert ours.tobytes() == theirs.tobytes() != base.tobytes()


def test_text_encoders_can_train_too(dpo_config: Any) -> None:
    trainer = DPOTrainer(dpo_config(train_text_encoder=True))
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    table = rows(trainer.train())
    assert table[0]["loss"] == LN2 and table[1]["loss"] != LN2
    moved = {name.split(".")[0] for name, p in trainer.policy.parameters.items() if not torch.equal(p, before[name])}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}


def test_ties_kept_as_half_pull_to_equal_preference(dpo_config: Any) -> None:
    trainer = DPOTrainer(dpo_config(ties="keep"))
    assert trainer.batches.samples == 10
    labels = {b.label[i].item() for b in trainer.batches.stream(0, 5) for i in range(2)}
    assert labels == {0.5, 1.0}


def test_one_noise_and_one_timestep_for_both_halves(dpo_config: Any) -> None:
    batch = next(DPOTrainer(dpo_config(proportion_empty_prompts=0.5)).batches.stream(0, 1))
    for tensor in (batch.noise, batch.timesteps, *batch.text().values()):
        first, second = tensor.chunk(2)
        assert torch.equal(first, second)
    first, second = batch.latents.chunk(2)
    assert not torch.equal(first, second)


def test_dropped_prompts_are_the_empty_prompt(dpo_config: Any) -> None:
    trainer = DPOTrainer(dpo_config(proportion_empty_prompts=1.0))
    text = next(trainer.batches.stream(0, 1)).text()
    empty = trainer.family.encode_prompts([""])
    for name, value in text.items():
        torch.testing.assert_close(value, empty[name].expand_as(value))


def test_an_implausible_beta_is_said_at_the_start(dpo_config: Any, capsys: Any) -> None:
    DPOTrainer(dpo_config(beta_dpo=0.1, max_train_steps=1)).train()
    assert "far from the 2000 to 5000" in capsys.readouterr().out


def test_no_pairs_left_after_ties_is_an_error_before_training(dpo_config: Any, write_pairs: Any) -> None:
    folder = write_pairs([{"prompt": "toy", "chosen": "a.png", "rejected": "b.png", "label": 0.5}])
    with pytest.raises(UserError, match="tie"):
        DPOTrainer(dpo_config(dataset_name=str(folder)))


def test_a_resolution_the_vae_cannot_have_is_an_error(dpo_config: Any) -> None:
    with pytest.raises(UserError, match="divisible by 8"):
        dpo_config(resolution=20)


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"optimizer": "adafactor", "weight_decay": 0.0},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "scale_lr": True, "learning_rate": 1e-3},
        {"lora_targets": ["to_q", "ff.net.2"], "lora_alpha": 4.0, "lora_dropout": 0.5},
        {"aspect_ratio_buckets": "16,16;16,32"},
        {"random_crop": True, "random_flip": True},
        {"loss_type": "ipo"},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"dataloader_num_workers": 1},
        {"use_ema": True, "save_comfyui_lora": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_train(dpo_config: Any, options: dict[str, Any]) -> None:
    trainer = DPOTrainer(dpo_config(**options))
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    run = trainer.train()
    table = rows(run)
    assert table[0]["margin"] == 0.0 and table[-1]["margin"] != 0.0
    assert all(row["skipped_steps"] == 0 for row in table)
    assert not all(torch.equal(p, before[name]) for name, p in trainer.policy.parameters.items())
    assert bool(list(run.glob("*_comfyui.safetensors"))) == options.get("save_comfyui_lora", False)


def test_checkpointing_changes_memory_not_losses(dpo_config: Any, tmp_path: Path) -> None:
    plain = rows(DPOTrainer(dpo_config()).train())
    saved = rows(DPOTrainer(dpo_config(gradient_checkpointing=True, output_dir=str(tmp_path / "other"))).train())
    assert [r["loss"] for r in saved] == pytest.approx([r["loss"] for r in plain], rel=1e-5)


@pytest.mark.parametrize("model", ["tiny_sd_path", "tiny_sd_v_path"])
def test_stable_diffusion_trains_too_in_epsilon_and_v(dpo_config: Any, model: str, request: Any) -> None:
    config = dpo_config(pretrained_model_name_or_path=str(request.getfixturevalue(model)))
    table = rows(DPOTrainer(config).train())
    assert table[0]["loss"] == LN2 and table[1]["loss"] != LN2
