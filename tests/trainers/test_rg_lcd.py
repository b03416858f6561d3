"""RG-LCD: what the reward adds to distillation, with and without the proxy, and that a run resumes to its bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.trainers import load_method
from diffalign.trainers.rg_lcd import RGLCDTrainer, rg_lcd_losses
from diffalign.training.proxy_learner import Lesson

REWARDS = """
from diffalign.rewards import Reward

class Red(Reward):
    name = "red"
    differentiable = True
    uses_prompt = False

    def score(self, images, prompts, metadata):
        return images[:, 0].flatten(1).mean(1)

class Blind(Red):
    name = "blind"
    differentiable = False

class Holes(Red):
    name = "holes"

    def score(self, images, prompts, metadata):
        if any(prompt.endswith("1") for prompt in prompts):
            raise RuntimeError("cannot score this")
        return super().score(images, prompts, metadata)
"""
Start = Callable[..., Any]


@pytest.fixture
def start(pair_settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Start:
    """A trainer of three steps on nine images; keyword arguments override."""
    (tmp_path / "rewards.py").write_text(REWARDS)

    def make(method: str = "rg_lcd", **overrides: Any) -> Any:
        own: dict[str, Any] = {"lora_targets": None, "w_max": 3.0, "learning_rate": 1e-3, "checkpointing_steps": 0}
        if method == "rg_lcd":
            own["rewards"] = [f"{tmp_path}/rewards.py:{overrides.pop('reward', 'Red')}"]
        config, trainer = load_method(method)
        return trainer(config(**pair_settings(**{**own, **overrides})))

    return make


PROXY: dict[str, Any] = {"proxy": "shapes-clip", "proxy_learning_rate": 1e-3, "expert_scale": 20.0}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "pytorch_lora_weights.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# The objective ----------------------------------------------------------------------------------------------------


def test_the_loss_is_distillation_minus_the_scaled_reward() -> None:
    distillation = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    rewards = torch.tensor([0.5, -1.0, torch.nan], dtype=torch.float64)
    assert rg_lcd_losses(distillation, rewards, 2.0).tolist() == pytest.approx([-0.9, 2.2, 0.3], abs=1e-15)
    # relu(2 - 0.5) = 1.5; a reward above the ceiling counts no more.
    held = rg_lcd_losses(distillation, torch.tensor([0.5, 3.0, torch.nan]).double(), 2.0, ceiling=2.0)
    assert held.tolist() == pytest.approx([3.1, 0.2, 0.3], abs=1e-15)
    assert torch.equal(rg_lcd_losses(distillation, rewards, 0.0), distillation)


def test_the_gradient_of_the_loss_is_right_where_a_reward_is_missing() -> None:
    distillation = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    known = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    def losses(distillation: Tensor, known: Tensor) -> Tensor:
        rewards = torch.full((3,), torch.nan, dtype=torch.float64).index_put((torch.tensor([0, 2]),), known)
        return rg_lcd_losses(distillation, rewards, 0.7, ceiling=2.0)

    assert torch.autograd.gradcheck(losses, (distillation, known))


# Against plain distillation ---------------------------------------------------------------------------------------


def test_without_beta_it_is_lcd_bit_for_bit(start: Start, tmp_path: Path) -> None:
    two: dict[str, Any] = {"max_train_steps": 2}
    plain = start("lcd", output_dir=str(tmp_path / "lcd"), **two).train()
    for name, own in (("direct", {}), ("proxy", {**PROXY, "reward": "Blind"})):
        guided = start(reward_scale=0.0, output_dir=str(tmp_path / name), **two, **own).train()
        for theirs, ours in zip(rows(plain), rows(guided), strict=True):
            assert all(ours[key] == value for key, value in theirs.items() if "second" not in key), name
        assert equal(weights(plain), weights(guided))
    moved = start(reward_scale=1.0, output_dir=str(tmp_path / "moved"), **two).train()
    assert not equal(weights(plain), weights(moved))


@pytest.mark.parametrize("own", [{}, PROXY], ids=["direct", "proxy"])
def test_the_gradient_reaches_the_student_through_decoder_or_proxy(own: dict[str, Any], start: Start) -> None:
    trainer: RGLCDTrainer = start(reward_scale=50.0, decode_batch_size=1, train_batch_size=3, **own)
    parameters = list(trainer.policy.parameters.values())
    with torch.no_grad():
        # Saturated pixels would differ, on purpose: the clamp lets their gradient through.
        trainer.family.vae.decoder.conv_out.weight.mul_(0.1)
        for i, parameter in enumerate(parameters):  # Off the start of a LoRA, where half of the gradient is 0.
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    batch = next(trainer.batches.stream(0, 1))
    rewards = trainer._rewards

    def loss() -> Tensor:
        distilled = trainer.distil(batch)
        return -rewards(distilled, torch.arange(3))[0].sum()

    gradients = torch.autograd.grad(loss(), parameters)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert norm > 0
    size, ends = 2e-3 if own else 5e-3, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(sign * size * gradient / norm)
            ends.append(loss().double())
    assert ((ends[0] - ends[1]) / (2 * size)).item() == pytest.approx(norm.item(), rel=0.03)


@pytest.mark.parametrize("own", [{}, {**PROXY, "proxy_learning_rate": 1e-12}], ids=["direct", "proxy"])
def test_what_guides_it_comes_to_like_its_predictions(own: dict[str, Any], start: Start, tmp_path: Path) -> None:
    def reward_after(beta: float) -> float:
        trainer: RGLCDTrainer = start(
            reward_scale=beta,
            max_train_steps=4,
            train_batch_size=4,
            learning_rate=5e-3,
            output_dir=str(tmp_path / f"beta-{beta:g}"),
            **own,
        )
        batch = next(trainer.batches.stream(0, 1))
        trainer.train()
        with torch.no_grad():
            return float(trainer._rewards(trainer.distil(batch), torch.arange(4))[0].mean())

    plain, guided = reward_after(0.0), reward_after(30.0)
    # One-step predictions of random weights are far from any image, and the proxy is nearly flat out there.
    assert guided > plain + (5e-4 if own else 5e-3), (plain, guided)


# Which images count, and the proxy's lessons ------------------------------------------------------------------------


def lessons_of(trainer: RGLCDTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Lesson]:
    """Those of a trainer's first step."""
    found: list[Lesson] = []
    assert trainer.learner is not None

    def listen(lessons: Any) -> dict[str, float]:
        found.extend(lessons)
        return {}

    monkeypatch.setattr(trainer.learner, "step", listen)
    trainer.training_step(trainer.batches.stream(0, 1))
    return found


def test_prompts_latents_and_scores_of_a_lesson_belong_together(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: RGLCDTrainer = start(
        reward="Blind", train_batch_size=3, gradient_accumulation_steps=3, proxy_batch_size=5, **PROXY
    )
    items = trainer.batches.items
    own = {items.prompts[i]: items[i]["latents"] for i in range(len(items))}
    found = lessons_of(trainer, monkeypatch)
    prompts = [prompt for lesson in found for prompt in lesson.prompts]
    assert len(prompts) == 5 == len(set(prompts)), "five of nine images"
    for lesson in found:
        for latents, prompt, expert in zip(lesson.latents, lesson.prompts, lesson.expert, strict=True):
            assert torch.equal(latents[2], own[prompt])
            scores = trainer.family.decode_latents(latents)[:, 0].mean((-1, -2))
            assert torch.allclose(expert, 20 * scores, atol=1e-4)
            assert not torch.allclose(latents[0], latents[1])


def test_dropped_prompts_and_noisy_predictions_have_no_reward(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: RGLCDTrainer = start(
        train_batch_size=9, proportion_empty_prompts=0.3, reward_max_timestep=499, reward_scale=1.0, **PROXY
    )
    batch = next(trainer.batches.stream(0, 1))
    counted = [bool(p) and t <= 499 for p, t in zip(batch.prompts, batch.timesteps.tolist(), strict=True)]
    assert 0 < sum(counted) < sum(map(bool, batch.prompts)) < 9, "the draw must hold all three kinds"
    rewards, report = trainer._rewards(distilled := trainer.distil(batch), trainer._counted(distilled))
    assert rewards.isfinite().tolist() == counted and report["proxy_reward"][1] == sum(counted)
    assert sum(len(lesson.prompts) for lesson in lessons_of(trainer, monkeypatch)) == sum(counted)


def test_a_batch_without_any_image_that_counts_is_plain_distillation(start: Start) -> None:
    for own in ({}, PROXY):
        trainer: RGLCDTrainer = start(reward_max_timestep=0, overwrite_output_dir=True, **own)
        metrics = trainer.training_step(trainer.batches.stream(0, 1))
        assert metrics["loss"] == metrics["distillation"] and "reward" not in metrics and "proxy_loss" not in metrics


def test_the_students_pass_leaves_no_gradient_in_the_proxy(start: Start) -> None:
    trainer: RGLCDTrainer = start(**PROXY)
    loss, _ = trainer.compute_loss(next(trainer.batches.stream(0, 1)))
    loss.backward()
    assert trainer.learner is not None and trainer.learner.parameters
    assert all(p.grad is None for p in trainer.learner.proxy.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.parameters())


def test_an_image_that_cannot_be_scored_is_left_out(start: Start) -> None:
    for own in ({}, PROXY):
        trainer: RGLCDTrainer = start(
            reward="Holes", on_reward_failure="drop", train_batch_size=9, overwrite_output_dir=True, **own
        )
        assert "toy 1" in trainer.batches.items.prompts
        metrics = trainer.training_step(trainer.batches.stream(0, 1))
        assert metrics["reward"] == pytest.approx(metrics["reward"]) and metrics["grad_norm"] > 0


def test_the_metrics_say_what_happened(start: Start, capsys: Any) -> None:
    table = rows(start(reward="Blind", train_batch_size=9, max_train_steps=1, **PROXY).train())
    names = {"distillation", "proxy_reward", "reward", "reward_of_target", "reward_of_image", "proxy_loss"}
    assert names | {"proxy_accuracy", "proxy_grad_norm", "proxy_seconds"} <= table[0].keys()
    assert table[0]["loss"] == pytest.approx(table[0]["distillation"] - table[0]["proxy_reward"], abs=1e-5)
    assert table[0]["step_seconds"] > table[0]["proxy_seconds"] > 0
    out = capsys.readouterr().out
    assert "shapes-clip" in out and "beta" in out


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_reward_without_a_gradient_needs_a_proxy(start: Start) -> None:
    with pytest.raises(UserError, match=r"no gradient can pass through blind\. Let a latent proxy learn"):
        start(reward="Blind")
    assert start(reward="Blind", **PROXY).learner is not None


def test_impossible_settings_are_refused(start: Start) -> None:
    with pytest.raises(UserError, match="reward_ceiling is in the reward's unit"):
        start(reward_ceiling=2.0, **PROXY)
    with pytest.raises(UserError, match="reward_scale must be 0 or more"):
        start(reward_scale=-1.0)
    with pytest.raises(UserError, match="train_text_encoder"):
        start(train_text_encoder=True)
    with pytest.raises(UserError, match="could not load"):
        start(proxy="/no/such/clip")


# Resuming, and the judge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{"decode_batch_size": 1}, PROXY], ids=["direct", "proxy"])
def test_a_run_resumed_is_the_run_that_was_not_stopped(start: Start, tmp_path: Path, way: dict[str, Any]) -> None:
    own: dict[str, Any] = {
        **way,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "heldout_prompts": "shapes-heldout",
        "num_heldout_prompts": 2,
        "evaluation_steps": 1,
        "evaluation_inference_steps": 1,
    }
    whole = start(output_dir=str(tmp_path / "whole"), **own).train()
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-2")
    again = start(output_dir=str(tmp_path / "again"), resume_from_checkpoint="latest", **own).train()
    for theirs, ours in zip(rows(whole), rows(again), strict=True):
        assert all(ours[key] == value for key, value in theirs.items() if "second" not in key)
    assert equal(weights(whole), weights(again))
    for name in ("policy.safetensors", *(["proxy.safetensors"] if "proxy" in way else [])):
        assert equal(*(load_file(run / "checkpoint-2" / name) for run in (whole, again))), name
    assert (whole / "heldout.jsonl").read_text() == (again / "heldout.jsonl").read_text()
    assert (whole / "best" / "step.json").is_file() and (whole / "heldout.jsonl").read_text().count("\n") == 3


def test_a_checkpoint_without_a_proxy_is_named(start: Start, tmp_path: Path) -> None:
    run = start(max_train_steps=1, checkpointing_steps=1).train()
    with pytest.raises(UserError, match="has no proxy"):
        start(
            max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint=str(run / "checkpoint-1"), **PROXY
        ).train()
