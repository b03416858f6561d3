"""The trial before a run: it changes nothing, it finds what would fail, and it says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.trainers import load_method
from diffalign.training import dry_run

Settings = Callable[..., dict[str, Any]]
TIMES = {"step_seconds", "data_seconds", "samples_per_second", "rollout_seconds", "sampling_seconds", "reward_seconds"}


DRAWN = {"validation_prompts": ["a red circle"], "validation_inference_steps": 2, "validation_steps": 100}


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def run(method: str, settings: dict[str, Any], folder: Path, **more: Any) -> Path:
    config, trainer = load_method(method)
    own = {"output_dir": str(folder), "checkpointing_steps": 2}
    return trainer(config(**{**settings, **own, **more})).train()


def same(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    for name in ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert (a / name).exists() == (b / name).exists()
        if (a / name).exists():
            first, second = load_file(a / name), load_file(b / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dpo", {"lora_dropout": 0.2, "gradient_accumulation_steps": 2, "use_ema": True}),
        ("mapo", {"train_mode": "full", "learning_rate": 1e-4, **DRAWN}),
        pytest.param("kto", {}, marks=pytest.mark.slow),
        pytest.param("lcd", {}, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_data_is_the_same_bit_for_bit(
    method: str, changes: dict[str, Any], pair_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = pair_settings(**changes)
    tried = run(method, settings, tmp_path / "tried", check_first=True)
    said = capsys.readouterr().out
    assert (
        "dry run: saving" in said
        and ("validation" in said) == ("validation_prompts" in changes)
        and "2 at once of 16 x 16 pixels" in said
    )
    plain = run(method, settings, tmp_path / "plain", check_first=False)
    assert "dry run" not in capsys.readouterr().out
    same(tried, plain)
    assert not (tried / dry_run.FOLDER).exists()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param("awm", {}, marks=pytest.mark.slow),
        ("ddpo", {"advantage": "tracker"}),
        ("reward_gradient", {"rewards": "Red"}),
    ],
)
def test_a_run_on_rewards_is_the_same_bit_for_bit(
    method: str, changes: dict[str, Any], online_settings: Settings, tmp_path: Path
) -> None:
    settings = online_settings(**changes)
    if method == "reward_gradient":
        settings = {k: v for k, v in settings.items() if not k.startswith("num_") or k == "num_inference_steps"}
        # A transform with running statistics, which a trial must not move.
        settings |= {"rewards": [{"reward": f"{tmp_path}/rewards.py:Red", "transform": {"kind": "zscore"}}]}
    both = [run(method, settings, tmp_path / name, check_first=name == "tried") for name in ("tried", "plain")]
    same(*both)


def test_a_resumed_run_is_the_same(pair_settings: Settings, tmp_path: Path) -> None:
    settings = pair_settings(max_train_steps=4)
    whole = run("dpo", settings, tmp_path / "whole")
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint-4")
    resumed = run("dpo", settings, again, resume_from_checkpoint="latest", check_first=True)
    same(whole, resumed)


def test_dry_run_makes_only_the_trial(pair_settings: Settings, tmp_path: Path) -> None:
    folder = run("mapo", pair_settings(), tmp_path / "run", dry_run=True)
    assert [path.name for path in folder.iterdir() if path.name != "logs"] == ["config.yaml"]
    # And the folder is free for the run itself.
    assert (run("mapo", pair_settings(), folder) / "pytorch_lora_weights.safetensors").exists()


def test_the_trial_takes_the_largest_bucket(pair_settings: Settings, tmp_path: Path, monkeypatch: Any) -> None:
    config, trainer_class = load_method("dpo")
    folder = tmp_path / "shapes"
    shutil.copytree(pair_settings()["dataset_name"], folder)
    from PIL import Image

    for side in ("chosen", "rejected"):
        Image.new("RGB", (48, 24)).save(folder / f"{side}-1.png")
    settings = pair_settings(dataset_name=str(folder), aspect_ratio_buckets="16,16;16,32", resolution=None)
    trainer = trainer_class(config(**settings))
    batch, shape = trainer.batches.trial()
    assert shape == "16 x 32 pixels" and batch.latents.shape[-2:] == (8, 16)
    assert len(batch.latents) == 4, "one sample of this shape fills a micro-batch"


@pytest.mark.parametrize("phase", ["the step", "validation"])
def test_running_out_of_memory_says_where_and_what_to_change(
    phase: str, pair_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trainer_class = load_method("dpo")

    def too_much(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    if phase == "the step":
        monkeypatch.setattr(trainer_class, "compute_loss", too_much)
    else:
        monkeypatch.setattr(dry_run, "draw_images", too_much)
    with pytest.raises(UserError) as caught:
        run("dpo", pair_settings(**DRAWN), tmp_path / "run", check_first=True)
    text = str(caught.value)
    assert f"out of memory in {phase} of the dry run: 2 at once, 16 x 16 pixels" in text
    assert "estimated to need" in text
    assert phase == "validation" or "Use gradient_checkpointing: true (about" in text
    assert not (tmp_path / "run" / dry_run.FOLDER).exists()


def test_running_out_of_memory_later_says_so_too(
    pair_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trainer_class = load_method("dpo")
    real = trainer_class.compute_loss

    def late(self: Any, batch: Any) -> Any:
        if self.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(trainer_class, "compute_loss", late)
    with pytest.raises(UserError, match="out of memory in step 2"):
        run("dpo", pair_settings(), tmp_path / "run")


def test_a_disk_that_cannot_hold_the_checkpoints(
    pair_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "free_space", lambda path: 1000)
    with pytest.raises(UserError, match=r"2 checkpoints of .* do not go into"):
        run("dpo", pair_settings(), tmp_path / "run", check_first=True)
