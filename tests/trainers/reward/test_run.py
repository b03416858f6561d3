"""Whole runs: what they learn, what they leave, and that they can be stopped anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign import cli
from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.trainers.reward.config import RewardTrainingConfig
from diffalign.trainers.reward.report import REPORT_FILE
from diffalign.trainers.reward.trainer import RewardTrainer

MakeConfig = Callable[..., RewardTrainingConfig]
TINY = {
    "from_scratch": True,
    "train_mode": "full",
    "model_config": {
        "vision_config.num_hidden_layers": 1,
        "vision_config.hidden_size": 32,
        "vision_config.patch_size": 32,
        "text_config.num_hidden_layers": 1,
    },
}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / REPORT_FILE).read_text()))


def heldout_scores(trainer: RewardTrainer, reward: str) -> np.ndarray:
    """Margins of the held-out pairs by a reward found by name."""
    part = trainer.parts.heldout
    sides = zip(*(part.pictures(index) for index in range(len(part))), strict=True)
    prompts = [choice.prompt for choice in part.choices]
    loaded = load_reward(reward, device="cpu")
    chosen, rejected = (loaded([picture.decode() for picture in side], prompts).rewards for side in sides)
    return (chosen - rejected).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"train_mode": "head"},
        {"train_mode": "head", "head_hidden": 8, "head_dropout": 0.1, "objective": "rao_kupper"},
        {"train_mode": "lora", "rank": 4, "lora_dropout": 0.1, "max_train_steps": 8, "eval_steps": 4},
        {**TINY, "learning_rate": 3e-3, "contrastive_weight": 0.1, "random_shift": 0.1, "random_flip": True},
    ],
    ids=["linear-head", "mlp-head", "lora", "from-scratch"],
)
def test_a_run_learns_and_its_result_is_a_reward(reward_config: MakeConfig, settings: dict[str, Any]) -> None:
    trainer = RewardTrainer(
        reward_config(**{"max_train_steps": 30, "train_batch_size": 8, "eval_steps": 10, **settings})
    )
    folder = trainer.train()
    found = report(folder)
    assert found["heldout_accuracy"]["rate"] > 0.9 > found["start_heldout_accuracy"]["rate"]
    assert set(found["heldout_accuracy_by_user"]) == {"user 0", "user 1", "user 2"}
    assert found["calibration"]["applied"]
    margins = heldout_scores(trainer, f"trained:{folder}")
    np.testing.assert_allclose(margins, trainer.score("heldout").margins, rtol=1e-3, atol=1e-3)
    if trainer.config.train_mode != "head":
        plain = heldout_scores(trainer, f"pickscore:{folder}")
        np.testing.assert_allclose(plain, margins, rtol=1e-3, atol=1e-3)
    text = (folder / "README.md").read_text()
    assert "bt_logit" in text and f'load_reward("trained:{folder.name}")' in text


def test_scores_are_divided_by_the_temperature_only_when_asked(reward_config: MakeConfig, tmp_path: Path) -> None:
    trainers = [RewardTrainer(reward_config(tmp_path / str(on), calibrate=on)) for on in (False, True)]
    raw, divided = (heldout_scores(trainer, f"trained:{trainer.train()}") for trainer in trainers)
    temperature = report(tmp_path / "True")["calibration"]["temperature"]
    assert temperature != pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(raw / temperature, divided, rtol=1e-4)


def test_a_resumed_run_is_the_run(reward_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"train_mode": "lora", "rank": 2, "lora_dropout": 0.2, "random_shift": 0.1, "eval_steps": 1}
    whole = RewardTrainer(reward_config(tmp_path / "whole", **settings)).train()
    broken = RewardTrainer(reward_config(tmp_path / "broken", **settings))
    stream = broken.batches.stream(0, 6)
    with torch.random.fork_rng():
        broken.start = {"rate": 0.5, "low": 0.0, "high": 1.0, "n": 1}
        broken._evaluate()
        for _ in range(3):
            broken.training_step(stream)
        broken._save()
        broken.training_step(stream)  # is lost, with the best weights it may have left
    resumed = RewardTrainer(reward_config(tmp_path / "broken", resume_from_checkpoint="latest", **settings))
    resumed.train()
    for file in ("model.safetensors", "checkpoint-6/weights.safetensors"):
        one, two = load_file(whole / file), load_file(tmp_path / "broken" / file)
        assert all(torch.equal(one[name], two[name]) for name in one)
    timed = ("step_seconds", "data_seconds", "samples_per_second")
    after = [{k: v for k, v in row.items() if k not in timed} for row in rows(whole)[3:]]
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows(tmp_path / "broken")] == after


def test_accumulation_changes_nothing_though_pairs_weigh_differently(
    reward_config: MakeConfig, tmp_path: Path
) -> None:
    """Weights are normalised over the step, not over the micro-batch."""
    common = {"heldout_share": 0.1, "validation_share": 0.1, "max_train_samples": 37, "learning_rate": 1e-3}
    shapes = {"one": {"train_batch_size": 8}, "four": {"train_batch_size": 2, "gradient_accumulation_steps": 4}}
    folders = [
        RewardTrainer(reward_config(tmp_path / name, **common, **shape)).train() for name, shape in shapes.items()
    ]
    one, four = (load_file(folder / "checkpoint-6" / "weights.safetensors") for folder in folders)
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-6)
    losses = [[row["loss"] for row in rows(folder)] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_best_weights_are_kept_and_a_run_without_progress_stops(reward_config: MakeConfig) -> None:
    trainer = RewardTrainer(
        reward_config(learning_rate=1e-12, eval_steps=1, early_stopping_patience=2, calibrate=False)
    )
    folder = trainer.train()
    assert trainer.best["step"] == 0 and len(rows(folder)) == 2
    head = load_file(folder / "head.safetensors")
    assert not head["last.weight"].any(), "the head of step 0 is all zeros"
    assert report(folder)["heldout_accuracy"] == report(folder)["start_heldout_accuracy"]


def test_nothing_is_overwritten_unasked(reward_config: MakeConfig) -> None:
    folder = RewardTrainer(reward_config()).train()
    with pytest.raises(UserError, match="holds another run"):
        RewardTrainer(reward_config())
    (folder / "mine.txt").write_text("stays")
    RewardTrainer(reward_config(overwrite_output_dir=True, max_train_steps=3)).train()
    assert (folder / "mine.txt").exists() and not (folder / "checkpoint-6").exists()


def test_a_head_needs_no_copy_of_its_clip_and_finds_it_again(
    reward_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RewardTrainer(reward_config()).train()
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "reward.json").read_text())["base"] == "shapes-clip"
    monkeypatch.chdir(tmp_path)
    image = torch.full((1, 3, 40, 40), 0.5, requires_grad=True)
    load_reward(f"trained:{folder}", device="cpu")(image, "a red circle", grad=True).rewards.sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


def test_a_folder_that_is_no_trained_reward(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no reward\.json"):
        load_reward(f"trained:{tmp_path}")
    with pytest.raises(UserError, match="Write trained:FOLDER"):
        load_reward("trained")
    (tmp_path / "reward.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="update diffalign"):
        load_reward(f"trained:{tmp_path}")


def test_settings_of_the_model_that_do_not_exist(reward_config: MakeConfig) -> None:
    tiny = {**TINY, "model_config": {"vision_config.hidden_sise": 8}}
    with pytest.raises(UserError, match="Did you mean 'hidden_size'"):
        RewardTrainer(reward_config(**tiny))


def test_the_command(bright_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pretrained_model_name_or_path", "shapes-clip", "--dataset_name", str(bright_pairs)]
    words += ["--output_dir", str(tmp_path / "run"), "--train_mode", "head", "--max_train_steps", "2"]
    words += ["--train_batch_size", "4", "--report_to", "none", "--validation_share", "0.25"]
    assert cli.main(["train-reward", *words]) == 0
    assert f"the reward is trained:{tmp_path / 'run'}" in capsys.readouterr().out
