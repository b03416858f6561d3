"""The loop: exact resume, skipped non-finite steps, stopping by signal, folders that are never overwritten."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import DiffalignError, UserError
from diffalign.training.checkpoints import find_checkpoints
from diffalign.training.loop import Stopped

FILES = ("policy.safetensors", "ema.safetensors")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(a: Path, b: Path) -> None:
    """Weights, EMA and optimiser of two checkpoints are equal bit for bit."""
    for name in FILES:
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left), name
    left, right = (torch.load(p / "optimizer.pt", weights_only=True)["state"] for p in (a, b))
    assert all(torch.equal(left[i][k], right[i][k]) for i in left for k in left[i])
    assert (a / "trainer_state.json").read_text() == (b / "trainer_state.json").read_text()


def test_a_run_leaves_everything_behind(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "README.md", "pytorch_lora_weights.safetensors"}
    assert [path.name for path in find_checkpoints(whole_run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    table = rows(whole_run)
    assert [row["step"] for row in table] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "error", "grad_norm", "learning_rate", "samples_per_second", "data_seconds"} <= table[0].keys()
    assert table[-1]["loss"] != table[0]["loss"]


def test_resumed_from_any_checkpoint_a_run_ends_in_the_same_bits(
    whole_run: Path, toy_config: Any, toy_trainer: Any, tmp_path: Path
) -> None:
    for start in (2, 4):
        folder = tmp_path / f"from-{start}"
        checkpoint = str(whole_run / f"checkpoint-{start}")
        done = toy_trainer(toy_config(output_dir=str(folder), resume_from_checkpoint=checkpoint)).train()
        assert_same_state(done / "checkpoint-6", whole_run / "checkpoint-6")
        losses = [row["loss"] for row in rows(done)]
        assert losses == [row["loss"] for row in rows(whole_run)][start:]


def test_sigterm_saves_and_a_resume_ends_in_the_same_bits(
    whole_run: Path, toy_config: Any, toy_trainer: Any, tmp_path: Path
) -> None:
    class Interrupted(toy_trainer):
        def compute_loss(self, batch: Any) -> Any:
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().compute_loss(batch)

    with pytest.raises(Stopped, match="after step 3.*--resume_from_checkpoint latest"):
        Interrupted(toy_config(checkpointing_steps=100)).train()
    run = tmp_path / "run"
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-3"]
    toy_trainer(toy_config(resume_from_checkpoint="latest")).train()
    assert_same_state(run / "checkpoint-6", whole_run / "checkpoint-6")
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_a_non_finite_step_is_skipped_and_counted(toy_config: Any, toy_trainer: Any, tmp_path: Path) -> None:
    class Poisoned(toy_trainer):
        poison = frozenset({2})

    run = Poisoned(toy_config(checkpointing_steps=1)).train()
    before, after = (load_file(run / f"checkpoint-{n}" / "policy.safetensors") for n in (2, 3))
    assert all(torch.equal(before[k], after[k]) for k in before)
    last = load_file(run / "checkpoint-6" / "policy.safetensors")
    assert not all(torch.equal(before[k], last[k]) for k in before)
    table = rows(run)
    assert table[2]["loss"] is None and table[2]["skipped_steps"] == 1 and table[-1]["skipped_steps"] == 1


def test_many_non_finite_steps_stop_the_run_with_the_likely_causes(toy_config: Any, toy_trainer: Any) -> None:
    class Poisoned(toy_trainer):
        poison = frozenset(range(1, 10))

    with pytest.raises(DiffalignError, match="3 steps in a row.*learning_rate too high"):
        Poisoned(toy_config(max_nonfinite_steps=3)).train()


def test_accumulation_gives_the_losses_of_one_larger_batch(toy_config: Any, toy_trainer: Any, tmp_path: Path) -> None:
    settings = {"lora_dropout": 0.0, "use_ema": False, "max_train_steps": 4}
    one = toy_trainer(toy_config(output_dir=str(tmp_path / "a"), train_batch_size=4, **settings)).train()
    two = toy_config(output_dir=str(tmp_path / "b"), train_batch_size=1, gradient_accumulation_steps=4, **settings)
    other = toy_trainer(two).train()
    assert [r["loss"] for r in rows(one)] == pytest.approx([r["loss"] for r in rows(other)], abs=1e-5)


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    whole_run: Path, toy_config: Any, toy_trainer: Any
) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds another run .newest checkpoint: checkpoint-6"):
        toy_trainer(toy_config(output_dir=str(whole_run)))
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_overwriting_when_asked_starts_anew(toy_config: Any, toy_trainer: Any, tmp_path: Path) -> None:
    toy_trainer(toy_config(max_train_steps=2)).train()
    run = toy_trainer(toy_config(max_train_steps=1, overwrite_output_dir=True)).train()
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-1"]
    assert len(rows(run)) == 1


def test_latest_without_a_checkpoint_starts_at_step_0(toy_config: Any, toy_trainer: Any) -> None:
    run = toy_trainer(toy_config(max_train_steps=1, resume_from_checkpoint="latest")).train()
    assert [row["step"] for row in rows(run)] == [1]


def test_resuming_with_another_rank_is_an_error(whole_run: Path, toy_config: Any, toy_trainer: Any) -> None:
    config = toy_config(resume_from_checkpoint=str(whole_run / "checkpoint-2"), rank=4)
    with pytest.raises(UserError, match="holds other weights"):
        toy_trainer(config).train()


def test_full_fine_tuning_trains_every_weight_and_saves_the_denoiser(toy_config: Any, toy_trainer: Any) -> None:
    run = toy_trainer(toy_config(train_mode="full", max_train_steps=1, use_ema=False)).train()
    assert (run / "unet" / "config.json").exists()
    trained = load_file(run / "checkpoint-1" / "policy.safetensors")
    assert all(name.startswith("unet.") for name in trained) and len(trained) > 50


def test_validation_draws_the_base_once_and_the_policy_beside_it(toy_config: Any, toy_trainer: Any) -> None:
    run = toy_trainer(
        toy_config(validation_prompts=["a toy"], validation_steps=2, max_train_steps=2, validation_inference_steps=2)
    ).train()
    base = (run / "samples" / "base" / "0000.png").read_bytes()
    assert (run / "samples" / "step-0" / "0000.png").read_bytes() == base
    assert (run / "samples" / "step-2" / "0000.png").read_bytes() != base
    assert (run / "samples" / "step-2.png").exists()


def test_the_logged_learning_rate_is_that_of_the_step(toy_config: Any, toy_trainer: Any) -> None:
    config = toy_config(max_train_steps=4, learning_rate=1e-2, lr_warmup_steps=2, lr_scheduler="constant_with_warmup")
    assert [row["learning_rate"] for row in rows(toy_trainer(config).train())] == [0.0, 0.005, 0.01, 0.01]


def test_tensorboard_is_used_where_it_is_installed(toy_config: Any, toy_trainer: Any) -> None:
    pytest.importorskip("tensorboard")
    run = toy_trainer(toy_config(max_train_steps=1, report_to=["auto"])).train()
    assert list((run / "logs").rglob("events.out.tfevents*"))


def test_a_kill_between_checkpoints_costs_only_the_steps_since(
    whole_run: Path, toy_config: Any, toy_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if by kill -9 while checkpoint-4 was written: its half-written folder is there, the run is gone."""

    class Killed(BaseException):
        pass

    class Dying(toy_trainer):
        def _write_state(self, folder: Path) -> None:
            super()._write_state(folder)
            if self.step == 4:
                (tmp_path / "run" / ".checkpoint-4.half").mkdir()
                raise Killed

    with pytest.raises(Killed):
        Dying(toy_config()).train()
    run = toy_trainer(toy_config(resume_from_checkpoint="latest")).train()
    assert_same_state(run / "checkpoint-6", whole_run / "checkpoint-6")
    assert not list(run.glob(".checkpoint-*"))
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
