"""Methods on rewards through their trainers: prompts, rollouts, rewards, updates, judging, stopping and resuming."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import DiffalignError, UserError
from diffalign.rewards.base import RewardError
from diffalign.trainers import load_method
from diffalign.training.steps import Stopped

Settings = Callable[..., dict[str, Any]]

METHODS = ("ddpo", "rwr", "awm", "nft")


def run(method: str, settings: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    config_class, trainer_class = load_method(method)
    trainer = trainer_class(config_class(**settings))
    folder = trainer.train()
    return trainer, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumed_between_rollouts_is_the_run_that_was_not_stopped(
    method: str, online_settings: Settings, tmp_path: Path
) -> None:
    own: dict[str, Any] = {
        "use_ema": True,
        "rewards": [{"reward": f"{tmp_path}/rewards.py:red", "transform": {"kind": "zscore"}}],
        "advantage": "tracker",
        "tracker_min_count": 2,
        "heldout_prompts": "shapes-heldout",
        "num_heldout_prompts": 3,
        "evaluation_steps": 2,
    }
    _, whole = run(method, online_settings(**own))
    whole_weights = weights(tmp_path / "run")
    other = str(tmp_path / "other")
    run(method, online_settings(**own, output_dir=other, max_train_steps=2, lr_scheduler="constant"))
    _, resumed = run(method, online_settings(**own, output_dir=other, resume_from_checkpoint="latest"))
    timed = ("seconds", "per_second")
    for name in whole[-1]:
        if not name.endswith(timed):
            assert [r[name] for r in resumed] == [r[name] for r in whole], name
    resumed_weights = weights(Path(other))
    assert all(torch.equal(value, resumed_weights[name]) for name, value in whole_weights.items())
    assert any(value.abs().sum() > 0 for name, value in whole_weights.items() if "up" in name or "lora_B" in name)
    rows = [json.loads(line) for line in (Path(other) / "heldout.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]


def test_the_ratio_is_one_before_the_first_update_of_each_rollout(online_settings: Settings) -> None:
    _, rows = run("ddpo", online_settings())
    assert [row["log_ratio_error"] for row in rows[::2]] == [0, 0]
    assert all(row["log_ratio_error"] > 0 for row in rows[1::2])
    assert [row["rollout"] for row in rows] == [0, 0, 1, 1]


def test_training_that_sees_another_network_than_sampling_is_stopped(
    online_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_class, trainer_class = load_method("ddpo")
    trainer = trainer_class(config_class(**online_settings()))
    draw = trainer._draw

    def other_guidance(*args: Any) -> Any:
        trajectory = draw(*args)
        trajectory.log_probs += 1e-2
        return trajectory

    monkeypatch.setattr(trainer, "_draw", other_guidance)
    with pytest.raises(DiffalignError, match="ratio should be 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("method", "own"),
    [("ddpo", {"learning_rate": 1e-2, "clip_range": 1.0}), ("nft", {"learning_rate": 3e-2, "eta": 1.0})],
)
def test_the_reward_that_is_trained_rises(method: str, own: dict[str, Any], online_settings: Settings) -> None:
    size = {"max_train_steps": 16, "num_updates_per_rollout": 1, "checkpointing_steps": 0, "max_prompts": 1}
    _, rows = run(method, online_settings(**own, **size, guidance_scale=1.0))
    first, last = (sum(row["reward"] for row in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last > first + rows[0]["reward_std"]


def test_a_signal_while_images_are_drawn_saves_where_it_stands(online_settings: Settings) -> None:
    config_class, trainer_class = load_method("awm")
    trainer = trainer_class(config_class(**online_settings()))
    drawn = trainer.collect

    def asked(number: int) -> Any:
        trainer._stop_asked = number == 1
        return drawn(number)

    trainer.collect = asked
    with pytest.raises(Stopped, match="after step 2"):
        trainer.train()
    assert (trainer.output_dir / "checkpoint-2" / "trainer_state.json").exists()


def test_a_signal_between_updates_waits_for_the_end_of_the_rollout(online_settings: Settings) -> None:
    config_class, trainer_class = load_method("awm")
    trainer = trainer_class(config_class(**online_settings()))
    loss = trainer.compute_loss

    def asked(batch: Any) -> Any:
        trainer._stop_asked = True
        return loss(batch)

    trainer.compute_loss = asked
    with pytest.raises(Stopped, match="after step 2"):
        trainer.train()


def test_a_reward_that_fails_ends_the_run_and_says_which(online_settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="the scorer is down"):
        run("ddpo", online_settings(rewards=[f"{tmp_path}/rewards.py:broken"]))


def test_a_reward_that_fails_ends_the_drawing(
    online_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_class, trainer_class = load_method("ddpo")
    own = {"rewards": [f"{tmp_path}/rewards.py:broken"], "num_prompts_per_rollout": 4}
    trainer = trainer_class(config_class(**online_settings(**own)))
    draw, drawn, scoring = trainer._draw, [], threading.Event()
    score = trainer.scorer.score

    def failing(*args: Any) -> Any:
        try:
            return score(*args)
        finally:
            scoring.set()

    def counted(*args: Any) -> Any:
        drawn.append(args)
        if len(drawn) > 1:
            scoring.wait(30)
            time.sleep(0.1)  # Until the job has said that it is done.
        return draw(*args)

    monkeypatch.setattr(trainer.scorer, "score", failing)
    monkeypatch.setattr(trainer, "_draw", counted)
    with pytest.raises(RewardError, match="the scorer is down"):
        trainer.train()
    assert len(drawn) < 4


def test_over_optimisation_ends_the_run_and_the_best_policy_is_kept(online_settings: Settings, tmp_path: Path) -> None:
    judged = {"reward": f"{tmp_path}/rewards.py:blue", "eval_only": True}
    steps = {
        "max_train_steps": 60,
        "num_updates_per_rollout": 1,
        "checkpointing_steps": 0,
        "learning_rate": 1e-2,
        "clip_range": 1.0,
        "guidance_scale": 1.0,
        "heldout_prompts": "shapes-heldout",
        "num_heldout_prompts": 8,
        "evaluation_steps": 4,
        "early_stop": True,
    }
    trainer, rows = run("ddpo", online_settings(**steps, rewards=[f"{tmp_path}/rewards.py:red", judged]))
    assert len(rows) < 60
    best = json.loads((tmp_path / "run" / "best" / "step.json").read_text())["step"]
    assert best < rows[-1]["step"] == trainer.step
    assert weights(tmp_path / "run" / "best").keys() == weights(tmp_path / "run").keys()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_prompts_per_rollout": 3}, "equal shares: use num_prompts_per_rollout"),
        ({"train_batch_size": 3}, "cannot be cut into micro-batches"),
        ({"checkpointing_steps": 3}, "use 4"),
        ({"num_images_per_prompt": 1}, "must be at least 2"),
        ({"max_train_steps": None}, "max_train_steps"),
        ({"rewards": []}, "name at least one"),
        ({"early_stop": True}, "needs heldout_prompts"),
        ({"gradient_accumulation_steps": 7}, "does not fit"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(own: dict[str, Any], message: str, online_settings: Settings) -> None:
    config_class, trainer_class = load_method("awm")
    with pytest.raises(UserError, match=message):
        trainer_class(config_class(**online_settings(**own)))


def test_a_sampler_without_noise_and_dropout_are_refused_where_a_ratio_is_needed(
    online_settings: Settings,
) -> None:
    config_class, trainer_class = load_method("ddpo")
    with pytest.raises(UserError, match="use eta 1"):
        trainer_class(config_class(**online_settings(eta=0.0)))
    with pytest.raises(UserError, match="lora_dropout"):
        config_class(**online_settings(lora_dropout=0.1))
