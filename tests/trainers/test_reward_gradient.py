"""Reward gradients: what is differentiated, against numbers worked out by hand and against finite differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.trainers import load_method, reward_gradient
from diffalign.trainers.reward_gradient import PromptBatch, RewardGradientTrainer

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def gradient_settings(online_settings: Settings, tmp_path: Path) -> Settings:
    """Makes the settings of three steps by a differentiable reward."""

    def make(**own: Any) -> dict[str, Any]:
        settings = online_settings(rewards=[f"{tmp_path}/rewards.py:Red"], max_train_steps=3, checkpointing_steps=0)
        of_rollouts = ("num_prompts_per_rollout", "num_images_per_prompt", "num_updates_per_rollout")
        return {**{k: v for k, v in settings.items() if k not in of_rollouts}, "train_batch_size": 2, **own}

    return make


def make(settings: dict[str, Any]) -> Any:
    config_class, trainer_class = load_method("reward_gradient")
    return trainer_class(config_class(**settings))


def run(settings: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    folder = make(settings).train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(folder / "pytorch_lora_weights.safetensors")


class ToySteps:
    """``x_{i+1} = 0.9 x_i + 0.1 pred``, three times."""

    std = torch.zeros(3)
    timesteps = torch.arange(3)

    def __len__(self) -> int:
        return 3

    def step(self, pred: Tensor, x: Tensor, index: Tensor) -> Any:
        following = 0.9 * x + 0.1 * pred
        return SimpleNamespace(sample=lambda noise: following, x0=following)


def toy(monkeypatch: pytest.MonkeyPatch, theta: Tensor, **config: Any) -> tuple[Any, list[bool]]:
    """A trainer whose network predicts ``theta x`` from x_0 = 1, and which of its calls had a gradient."""
    with_grad: list[bool] = []

    def predict(family: Any, network: Any, x: Tensor, timesteps: Tensor, given: Any) -> Tensor:
        with_grad.append(torch.is_grad_enabled())
        return theta * x

    monkeypatch.setattr(reward_gradient, "guided_predict", predict)
    monkeypatch.setattr(
        reward_gradient, "starting_noise", lambda seeds, shape: torch.ones(len(seeds), *shape).double()
    )
    trainer = object.__new__(RewardGradientTrainer)
    defaults = {"gradient": "draft", "gradient_steps": 1, "kl_beta": 0.0, "checkpoint_steps": False}
    trainer.config = SimpleNamespace(**{**defaults, **config})  # type: ignore[assignment]
    trainer.steps, trainer.latent_shape = ToySteps(), (1, 1, 1)  # type: ignore[assignment]
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    trainer.policy = SimpleNamespace(denoiser=None, evaluating=nullcontext, modules={"unet": None})  # type: ignore[assignment]
    trainer.family = SimpleNamespace(denoiser_part="unet")  # type: ignore[assignment]
    return trainer, with_grad


def batch(u: float) -> PromptBatch:
    return PromptBatch(given=None, prompts=[], seeds=[0], u=u)  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "expected"), [(3, 0.363), (2, 0.242), (1, 0.121)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_of_the_last_steps(
    k: int, expected: float, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    trainer, _ = toy(monkeypatch, theta, gradient_steps=k, checkpoint_steps=checkpointed)
    x, _ = trainer._latents(batch(0.0))
    assert x.item() == pytest.approx(1.331, abs=1e-12)
    x.sum().backward()
    assert theta.grad is not None and theta.grad.item() == pytest.approx(expected, abs=1e-12)


def test_the_number_of_steps_with_gradient_is_drawn_once_and_they_are_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    seen = []
    for u in (0.0, 0.4, 0.99):
        trainer, with_grad = toy(monkeypatch, theta, gradient="alignprop", gradient_steps=3)
        trainer._latents(batch(u))
        seen.append(with_grad)
    assert seen == [[False, False, True], [False, True, True], [True, True, True]]


def test_refl_differentiates_one_of_the_last_steps_and_takes_its_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for u, calls in ((0.0, [False, True]), (0.9, [False, False, True])):
        trainer, with_grad = toy(monkeypatch, theta, gradient="refl", refl_last_steps=2)
        x, _ = trainer._latents(batch(u))
        assert with_grad == calls and x.item() == pytest.approx(1.1 ** len(calls))


def test_the_low_variance_form_averages_over_noisings_of_the_final_image(monkeypatch: pytest.MonkeyPatch) -> None:
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    trainer, with_grad = toy(monkeypatch, theta, gradient="draft_lv", lv_samples=2)
    trainer.steps.alpha, trainer.steps.sigma = torch.tensor([0.0, 0.5, 0.8, 1.0]), torch.tensor([1.0, 0.8, 0.6, 0.0])
    noise = iter((0.5, -1.0))
    monkeypatch.setattr(reward_gradient, "keyed_noise", lambda keys, shape: torch.full((1, *shape), next(noise)))
    x, _ = trainer._latents(batch(0.0))
    # The final image 1.1^3 at the level before the last step, and one step of the toy from there.
    starts = [0.8 * 1.331 + 0.6 * 0.5, 0.8 * 1.331 - 0.6]
    assert x.flatten().tolist() == pytest.approx([1.1 * start for start in starts], abs=1e-6)
    assert with_grad == [False, False, False, True, True]
    x.mean().backward()
    assert theta.grad is not None and theta.grad.item() == pytest.approx(0.1 * sum(starts) / 2, abs=1e-6)


def test_the_gradient_is_that_of_finite_differences(gradient_settings: Settings) -> None:
    trainer = make(gradient_settings(gradient_steps=3, decode_batch_size=1))
    parameters = trainer.policy.parameters.values()
    given = next(trainer.batches.stream(0, 1))
    with torch.no_grad():
        # Saturated pixels would differ, on purpose: the clamp lets their gradient through.
        trainer.family.vae.decoder.conv_out.weight.mul_(0.1)
        for i, parameter in enumerate(parameters):  # Off the start of a LoRA, where half of the gradient is 0.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))

    def loss() -> Tensor:
        return trainer.compute_loss(given)[0]

    gradients = torch.autograd.grad(loss(), list(parameters))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    size, ends = 0.02, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(sign * size * gradient / norm)
            ends.append(loss().double())
    assert ((ends[0] - ends[1]) / (2 * size)).item() == pytest.approx(norm.item(), rel=0.01)


@pytest.mark.parametrize(
    "own",
    [
        {"gradient": "draft", "gradient_steps": 2},
        {"gradient": "draft_lv"},
        {"gradient": "refl", "refl_last_steps": 2, "reward_ceiling": 2.0},
        {"gradient": "alignprop", "gradient_steps": 3, "eta": 1.0},
    ],
)
def test_each_form_runs_and_checkpointing_changes_nothing(
    own: dict[str, Any], gradient_settings: Settings, tmp_path: Path
) -> None:
    saved, weights = run(gradient_settings(**own, gradient_checkpointing=True))
    plain, others = run(gradient_settings(**own, checkpoint_steps=False, output_dir=str(tmp_path / "plain")))
    for name in ("loss", "grad_norm", "reward"):
        assert [r[name] for r in saved] == pytest.approx([r[name] for r in plain], abs=1e-5), name
    assert plain[-1]["images"] == 6 and all(row["grad_norm"] > 0 for row in plain)
    assert all(torch.allclose(value, others[name], atol=1e-4) for name, value in weights.items())


def test_the_reward_rises_and_a_pull_to_the_reference_holds_it(gradient_settings: Settings, tmp_path: Path) -> None:
    own = {"max_train_steps": 9, "learning_rate": 2e-2, "max_prompts": 1, "guidance_scale": 1.0}
    free, _ = run(gradient_settings(**own))
    held, _ = run(gradient_settings(**own, kl_beta=1e5, output_dir=str(tmp_path / "held")))
    rise, kept = (sum(r["reward"] for r in rows[-3:]) - sum(r["reward"] for r in rows[:3]) for rows in (free, held))
    assert rise > 0 and abs(kept) < 0.1 * rise


def test_a_run_resumed_is_the_run_that_was_not_stopped(gradient_settings: Settings, tmp_path: Path) -> None:
    own = {"gradient": "alignprop", "gradient_steps": 3, "eta": 1.0, "checkpointing_steps": 1}
    whole, weights = run(gradient_settings(**own))
    other = {**own, "output_dir": str(tmp_path / "other")}
    run(gradient_settings(**{**other, "max_train_steps": 1}))
    resumed, others = run(gradient_settings(**other, resume_from_checkpoint="latest"))
    assert [r["reward"] for r in resumed] == [r["reward"] for r in whole]
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_a_reward_without_a_gradient_is_refused(gradient_settings: Settings) -> None:
    with pytest.raises(UserError, match="no gradient can pass through jpeg_compressibility"):
        make(gradient_settings(rewards=["jpeg_compressibility"]))


def test_a_full_fine_tune_keeps_a_frozen_copy_only_for_a_pull_to_it(gradient_settings: Settings) -> None:
    own = {"train_mode": "full", "overwrite_output_dir": True}
    without, with_one = (make(gradient_settings(**own, kl_beta=beta)) for beta in (0.0, 0.1))
    assert without.policy.frozen_bytes == 0 < with_one.policy.frozen_bytes
    assert with_one.work(with_one.config).frozen_copy and not without.work(without.config).frozen_copy


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"gradient_steps": 2}, " 12 samples through it a step, 8 of them with gradient"),
        ({"gradient": "draft_lv", "lv_samples": 3}, " 24 samples through it a step, 12 of them with gradient"),
        ({"gradient": "alignprop", "guidance_scale": 1.0}, "at most 6 samples through it a step, 2 of them"),
    ],
)
def test_what_goes_through_the_network_is_said(own: dict[str, Any], said: str, gradient_settings: Settings) -> None:
    assert said in make(gradient_settings(**own)).summary()
