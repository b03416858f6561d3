"""Methods on rewards where it is easy to go wrong: stops while drawing, precision, references, odd sizes and data."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.trainers import load_method
from diffalign.training.heldout import Heldout
from diffalign.training.rollout import rollout
from diffalign.training.steps import Stopped

Settings = Callable[..., dict[str, Any]]


def make(method: str, settings: dict[str, Any]) -> Any:
    config_class, trainer_class = load_method(method)
    return trainer_class(config_class(**settings))


def run(method: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    folder = make(method, settings).train()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, other))
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("method", "own"), [("awm", {"ema_decay_rate": 0.3, "ema_beta": 10.0}), ("nft", {"old_decay_rate": 0.3})]
)
def test_a_run_killed_in_a_rollout_goes_on_exactly_copies_and_all(
    method: str, own: dict[str, Any], online_settings: Settings, tmp_path: Path
) -> None:
    run(method, online_settings(**own, max_train_steps=6))
    other = {**own, "max_train_steps": 6, "output_dir": str(tmp_path / "other")}
    trainer = make(method, online_settings(**other))
    draw, drawn = trainer._draw, []

    def asked(draws: Any, *rest: Any) -> Any:
        drawn.append(draws)
        trainer._stop_asked = len(drawn) == 5  # The first of two batches of the third rollout.
        return draw(draws, *rest)

    trainer._draw = asked
    with pytest.raises(Stopped, match="after step 4"):
        trainer.train()
    run(method, online_settings(**other, resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_kl_to_where_the_run_started_begins_at_zero(
    checkpointing: bool, online_settings: Settings, tmp_path: Path
) -> None:
    run("ddpo", online_settings(max_train_steps=2, learning_rate=1e-2))
    own = {"initial_lora": str(tmp_path / "run"), "reference": "start", "kl_beta": 0.1, "max_train_steps": 2}
    rows = run("ddpo", online_settings(**own, output_dir=str(tmp_path / "next"), gradient_checkpointing=checkpointing))
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0
    assert rows[0]["log_ratio_error"] == 0


@pytest.mark.parametrize(("batch", "bound"), [(4, 0.0), (8, 1e-4)])
def test_in_bf16_the_ratio_is_one_at_equal_batches_and_nearly_at_others(
    batch: int, bound: float, online_settings: Settings
) -> None:
    own = {"mixed_precision": "bf16", "rollout_batch_size": batch, "max_train_steps": 2}
    rows = run("ddpo", online_settings(**own))
    assert rows[0]["log_ratio_error"] <= bound


def test_in_bf16_the_policy_and_its_slow_copy_are_two(online_settings: Settings) -> None:
    rows = run("nft", online_settings(mixed_precision="bf16", max_train_steps=2, learning_rate=1e-2))
    assert rows[0]["distance_to_old"] == 0 < rows[1]["distance_to_old"]


def test_images_are_scored_while_the_next_are_drawn(
    online_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("awm", online_settings())
    draw, score, batches, second = trainer._draw, trainer.scorer.score, [], threading.Event()

    def drawn(*args: Any) -> Any:
        batches.append(args)
        if len(batches) == 2:
            second.set()
        return draw(*args)

    def scored(*args: Any) -> Any:
        assert second.wait(60), "the first batch must be scored before the second is drawn"
        return score(*args)

    monkeypatch.setattr(trainer, "_draw", drawn)
    monkeypatch.setattr(trainer.scorer, "score", scored)
    assert len(trainer.collect(0).scored.total) == 8


def test_a_few_step_sampler_is_judged_by_itself(online_settings: Settings) -> None:
    own = {"sampler": "lcm", "guidance_scale": 1.0, "heldout_prompts": "shapes-heldout", "num_heldout_prompts": 2}
    trainer = make("awm", online_settings(**own))
    prompts, seeds = trainer.heldout.prompts, [0, 1]
    given = trainer.condition(trainer.encode([prompt.text for prompt in prompts]))
    drawn = rollout(trainer.family, trainer.family.denoiser, trainer.steps, given, seeds, trainer.latent_shape)
    assert trainer.steps.timestep_scaling is not None
    assert torch.allclose(trainer._draw_heldout(prompts, seeds), trainer.decode(drawn.latents), atol=1e-5)


def test_judged_with_noise_it_is_drawn_as_in_rollouts_the_same_each_time(online_settings: Settings) -> None:
    own = {"eta": 1.0, "evaluation_eta": 1.0, "heldout_prompts": "shapes-heldout", "num_heldout_prompts": 2}
    trainer = make("ddpo", online_settings(**own))
    prompts, seeds = trainer.heldout.prompts, [0, 1]
    given = trainer.condition(trainer.encode([prompt.text for prompt in prompts]))
    drawn = rollout(trainer.family, trainer.family.denoiser, trainer.steps, given, seeds, trainer.latent_shape)
    judged = trainer._draw_heldout(prompts, seeds)
    assert torch.allclose(judged, trainer.decode(drawn.latents), atol=1e-5)
    assert torch.equal(judged, trainer._draw_heldout(prompts, seeds))


@pytest.mark.parametrize("method", ["ddpo", "awm", "nft", "rwr"])
def test_full_fine_tuning(method: str, online_settings: Settings, tmp_path: Path) -> None:
    own = {"train_mode": "full", "gradient_checkpointing": True, "max_train_steps": 2, "learning_rate": 1e-4}
    rows = run(method, online_settings(**own))
    assert all(row["loss"] is not None and row["grad_norm"] > 0 for row in rows)
    assert (tmp_path / "run" / "unet" / "config.json").exists()


@pytest.mark.parametrize("method", ["ddpo", "awm", "nft"])
def test_a_full_fine_tune_keeps_a_frozen_copy_only_for_a_pull_to_it(method: str, online_settings: Settings) -> None:
    own = {"train_mode": "full", "max_train_steps": 2, "learning_rate": 1e-4}
    rows = run(method, online_settings(**own, kl_beta=0.0))
    assert all(row["grad_norm"] > 0 and not {"kl_to_reference", "distance_to_reference"} & row.keys() for row in rows)
    without, with_one = (
        make(method, online_settings(**own, kl_beta=beta, overwrite_output_dir=True)) for beta in (0.0, 0.1)
    )
    weights = sum(p.numel() * p.element_size() for p in without.family.denoiser.parameters())
    assert without.policy.frozen_bytes == 0 and with_one.policy.frozen_bytes == weights
    assert with_one.work(with_one.config).frozen_copy and not without.work(without.config).frozen_copy


def test_checkpointed_activations_give_the_same_run(online_settings: Settings, tmp_path: Path) -> None:
    own = {"max_train_steps": 2, "ema_beta": 1.0}
    plain = run("awm", online_settings(**own))
    saved = run("awm", online_settings(**own, gradient_checkpointing=True, output_dir=str(tmp_path / "saved")))
    for name in ("grad_norm", "distance_to_reference", "distance_to_ema", "error_liked"):
        assert [r[name] for r in saved] == pytest.approx([r[name] for r in plain], abs=1e-5), name


def test_one_image_a_prompt_with_running_statistics(online_settings: Settings) -> None:
    own = {"advantage": "tracker", "num_images_per_prompt": 1, "num_prompts_per_rollout": 8, "tracker_min_count": 2}
    rows = run("ddpo", online_settings(**own))
    assert "zero_variance_groups" not in rows[0] and "group_distance" not in rows[0]
    assert rows[-1]["images"] == 16 and all(row["grad_norm"] > 0 for row in rows)


def test_metadata_of_prompts_reaches_the_reward(online_settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red circle", "sign": 1}\n{"prompt": "a blue square", "sign": -1}\n')
    own = {"prompts": str(file), "max_train_steps": 2}
    rows = run("awm", online_settings(**own, rewards=[f"{tmp_path}/rewards.py:wanted"]))
    # Half of the images are worth their brightness, half minus that.
    assert abs(rows[0]["reward"]) < 0.1 < 0.3 < rows[0]["reward_std"]
    with pytest.raises(UserError, match=r"signed needs sign with every prompt, and prompt 0 of .*prompts.txt"):
        other = str(tmp_path / "other")
        make("awm", online_settings(rewards=[f"{tmp_path}/rewards.py:Signed"], output_dir=other))


def test_prompts_that_a_reward_cannot_judge_are_refused_before_the_model_is_loaded(
    online_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a photo of a cat\n")
    own = {"rewards": ["shapes-checker"], "pretrained_model_name_or_path": "shapes-sdxl", "resolution": 64}
    with pytest.raises(UserError, match="shapes-checker cannot judge prompt 0"):
        make("ddpo", online_settings(**own))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"train_text_encoder": True}, "train the denoiser alone"),
        ({"max_train_steps": 3}, "max_train_steps 3 falls within a rollout of 2 steps.*use 4"),
        ({"evaluation_guidance_scale": 0.5}, "evaluation_guidance_scale must be at least 1"),
        ({"evaluation_eta": -1.0}, "evaluation_eta must be 0 or more"),
        ({"heldout_prompts": "shapes-heldout", "early_stop": True}, "eval_only: true"),
    ],
)
def test_settings_that_could_not_do_what_they_say_are_refused(
    own: dict[str, Any], message: str, online_settings: Settings
) -> None:
    with pytest.raises(UserError, match=message):
        make("awm", online_settings(**own))


def test_a_run_that_stopped_early_says_so_and_stays_stopped(
    online_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Heldout, "_over_optimised", lambda self, row, best: True)
    judged = {"reward": f"{tmp_path}/rewards.py:blue", "eval_only": True}
    settings = online_settings(
        rewards=[f"{tmp_path}/rewards.py:red", judged],
        heldout_prompts="shapes-heldout",
        num_heldout_prompts=2,
        evaluation_steps=2,
        early_stop=True,
        early_stop_patience=1,
        max_train_steps=6,
    )
    assert [row["step"] for row in run("awm", settings)] == [1, 2]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2 steps of 4 samples" in card and "`best/` holds" in card
    assert "rewards.py:blue` (judges only)" in card and "prompts.txt" in card and "None" not in card
    again = run("awm", {**settings, "resume_from_checkpoint": "latest"})
    assert [row["step"] for row in again] == [1, 2]


def test_the_arithmetic_is_said_at_the_start(online_settings: Settings) -> None:
    said = make("ddpo", online_settings()).summary()
    assert "3 prompts of" in said and "4 images an update, 4 at once" in said
    assert "2 rollouts, 16 images" in said and "48 samples through it to draw a rollout, 32 to train on it" in said
