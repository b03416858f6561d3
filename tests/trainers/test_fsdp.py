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
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from diffalign import cli, recipes
from diffalign.assets import ROOT
from diffalign.errors import UserError
from diffalign.pipelines import Family
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
    launch(folder, [["dpo", *words({**dpo, "output_dir": folder / "dpo-two"})]])
    shutil.copytree(folder / "dpo-two", half)
    for step in (2, 3):
        shutil.rmtree(half / f"checkpoint-{step}")
    shutil.copytree(half, folder / "dpo-alone")
    resumed = ["dpo", *words({**dpo, "output_dir": half, "resume_from_checkpoint": "latest"})]
    # Weights that stay together between the passes must not outlive those that are swapped in: ZeRO-2.
    launch(
        folder,
        [resumed, ["lcd", *words({**lcd, "output_dir": folder / "lcd-two"})]],
        FSDP_RESHARD_AFTER_FORWARD="false",
    )
    return folder


def launch(folder: Path, arguments: list[list[str]], **more: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **more}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = folder / "launched.py"
    script.write_text(LAUNCH)
    command = [*torchrun, str(script), json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
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
    two, alone = _Two(), _Two()
    alone.num_processes = 1
    assert not sharding.is_sharded(two)  # type: ignore[arg-type]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding.is_sharded(two) and not sharding.is_sharded(alone)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "recipes accelerate zero2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading",
        ),
    ],
)
def test_launches_that_cannot_work_say_so_before_anything_is_loaded(
    asked: dict[str, str], answer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sharding.check_launch()
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    config, trainer = load_method("dpo")
    with pytest.raises(UserError, match=answer):
        trainer(config(**{**FULL, "report_to": ["none"], "output_dir": str(tmp_path / "run")}))


def test_what_makes_no_sense_is_refused() -> None:
    config, _ = load_method("dpo")
    lora = config(pretrained_model_name_or_path="m", dataset_name="d", output_dir="o")
    with pytest.raises(UserError, match="train_mode: full"):
        sharding.check_sharded(lora)


@pytest.mark.parametrize(("name", "kind", "apart"), [("fsdp2", "FSDP", "true"), ("zero2", "FSDP", "false")])
def test_accelerate_reads_the_configurations_that_come_with_diffalign(name: str, kind: str, apart: str) -> None:
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(recipes.find_launch_config(name)), "-m", "diffalign", "train"]
    )
    settled, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(settled)
    assert load_config_from_file(settled.config_file).distributed_type == kind
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == apart
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    blocks = set(environment["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(","))
    assert blocks == set(Family.shard_blocks)


def test_every_configuration_is_one_of_accelerate(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.launch_configs() == ["ddp", "fsdp2", "zero2"]
    for name in recipes.launch_configs():
        assert load_config_from_file(str(recipes.find_launch_config(name))).num_processes == 8
        assert cli.main(["recipes", "accelerate", name]) == 0
        assert capsys.readouterr().out == recipes.find_launch_config(name).read_text()
        assert cli.main(["recipes", "accelerate", name, "--path"]) == 0
        assert capsys.readouterr().out.strip() == str(recipes.find_launch_config(name))
    assert cli.main(["recipes", "accelerate", "fsdp"]) == 2
