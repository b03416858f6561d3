"""Weights shared out between two processes (FSDP2, gloo): the run of one process, its checkpoints and its result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from diffalign.assets import ROOT
from diffalign.errors import UserError
from diffalign.trainers import load_method
from diffalign.training import sharding

# One process group for all runs: start-up is most of the time of a short one.
LAUNCH = """
import json, sys
from accelerate import Accelerator
from diffalign.cli import main
Accelerator.end_training = lambda self: None
sys.exit(max(main(["train", *arguments]) for arguments in json.loads(sys.argv[1])))
"""
FULL = {
    "pretrained_model_name_or_path": "shapes-sdxl",
    "dataset_name": "shapes-pairs",
    "max_train_samples": 16,
    "max_train_steps": 3,
    "train_mode": "full",
    "learning_rate": 1e-4,
    "use_ema": True,
    "checkpointing_steps": 1,
    "report_to": "none",
}


def words(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "unet" / "diffusion_pytorch_model.safetensors")


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPO of two processes, the same resumed from its first step, and LCD, whose target is a slow copy of the weights;
    beside them the same of one process."""
    folder = tmp_path_factory.mktemp("fsdp")
    shared = {**FULL, "cache_dir": folder / "cache"}
    dpo = {**shared, "beta_dpo": 500, "train_batch_size": 4, "validation_prompts": "a red circle"}
    dpo |= {"validation_inference_steps": 2, "validation_steps": 1, "check_first": True}
    lcd = {**shared, "learning_rate": 1e-5, "use_ema": False, "train_batch_size": 4, "checkpointing_steps": 0}
    for method, settings in (("dpo", dpo), ("lcd", lcd)):
        config, trainer = load_method(method)
        own = {**settings, "train_batch_size": 8, "output_dir": f"{folder}/{method}-one", "check_first": False}
        own |= {"report_to": ["none"], "cache_dir": str(folder / "cache")}
        if "validation_prompts" in own:
            own["validation_prompts"] = [own["validation_prompts"]]
        trainer(config(**own)).train()
    half = folder / "dpo-half"
    first = ["dpo", *words({**dpo, "output_dir": folder / "dpo-two"})]
    second = ["lcd", *words({**lcd, "output_dir": folder / "lcd-two"})]
    launch([first, second])
    shutil.copytree(folder / "dpo-two", half)
    for step in (2, 3):
        shutil.rmtree(half / f"checkpoint-{step}")
    shutil.copytree(half, folder / "dpo-alone")
    launch([["dpo", *words({**dpo, "output_dir": half, "resume_from_checkpoint": "latest"})]])
    return folder


def launch(arguments: list[list[str]]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("_launched.py")
    script.write_text(LAUNCH)
    try:
        done = subprocess.run(
            [*torchrun, str(script), json.dumps(arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
    finally:
        script.unlink()
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "lcd"])
def test_two_processes_give_the_run_of_one(method: str, runs: Path) -> None:
    one, two = runs / f"{method}-one", runs / f"{method}-two"
    start = load_file(ROOT / "shapes-sdxl" / "unet" / "diffusion_pytorch_model.safetensors")
    assert furthest(start, weights(two)) > 2e-5
    assert furthest(weights(one), weights(two)) < 1e-4
    for a, b in zip(*(_rows(run) for run in (one, two)), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_a_resumed_run_is_exact(runs: Path) -> None:
    whole, resumed = runs / "dpo-two", runs / "dpo-half"
    assert furthest(weights(whole), weights(resumed)) == 0
    for name in ("policy.safetensors", "ema.safetensors"):
        assert furthest(*(load_file(run / "checkpoint-3" / name) for run in (whole, resumed))) == 0


@pytest.mark.slow
def test_one_process_goes_on_from_a_checkpoint_of_two(runs: Path) -> None:
    """A checkpoint holds whole tensors: it does not matter how many processes wrote it."""
    folder = runs / "dpo-alone"
    config, trainer = load_method("dpo")
    own = {**FULL, "beta_dpo": 500, "train_batch_size": 8, "output_dir": str(folder), "report_to": ["none"]}
    own |= {"cache_dir": str(runs / "cache"), "resume_from_checkpoint": "latest"}
    trainer(config(**own)).train()
    assert furthest(weights(runs / "dpo-two"), weights(folder)) < 1e-4
    state = torch.load(folder / "checkpoint-3" / "optimizer.pt", weights_only=True)
    other = torch.load(runs / "dpo-two" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert {i: v["exp_avg"].shape for i, v in state["state"].items()} == {
        i: v["exp_avg"].shape for i, v in other["state"].items()
    }


@pytest.mark.slow
def test_the_result_is_a_whole_network_with_the_average(runs: Path) -> None:
    network = UNet2DConditionModel.from_pretrained(runs / "dpo-two" / "unet")
    average = load_file(runs / "dpo-two" / "checkpoint-3" / "ema.safetensors")
    assert furthest(dict(network.state_dict()), {n.removeprefix("unet."): v for n, v in average.items()}) == 0
    assert (runs / "dpo-two" / "samples" / "step-3.png").exists(), "one image, drawn by two processes"


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class _Two:
    """An accelerator of two processes, as far as it is looked at."""

    num_processes = 2
    distributed_type = "MULTI_CPU"


def test_when_weights_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharding.is_sharded(_Two())  # type: ignore[arg-type]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        sharding.is_sharded(_Two())  # type: ignore[arg-type]
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding.is_sharded(_Two())  # type: ignore[arg-type]
    alone = _Two()
    alone.num_processes = 1
    assert not sharding.is_sharded(alone)  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused() -> None:
    config, _ = load_method("dpo")
    lora = config(pretrained_model_name_or_path="m", dataset_name="d", output_dir="o")
    with pytest.raises(UserError, match="train_mode: full"):
        sharding.check_sharded(lora)
