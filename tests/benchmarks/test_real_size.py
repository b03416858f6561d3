"""The benchmarks of a step and of rollouts, on networks of a few thousand numbers: every method, every kind of row."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffalign.errors import UserError
from diffalign.trainers import METHODS

Script = Callable[[str], ModuleType]
DRAWN = {"ddpo", "reward_gradient", "rg_lcd"}
"""Methods whose batches come of their own sampler, or need a reward of their images."""


@pytest.fixture
def small_family(script: Script, tiny_sdxl_path: str) -> Any:
    return script("sdxl_model").random_family(tiny_sdxl_path, "cpu", torch.float32)


def arguments(**more: Any) -> Namespace:
    own = {"precision": "no", "steps": 1, "warmup": 0, "blocks": ["mid_block"], "settings": {}, "no_plain": False}
    axes = {"methods": ["dpo"], "resolutions": [16], "batch_sizes": [2], "ranks": [2], "modes": ["eager"]}
    return Namespace(**own, **axes, checkpointing=["none"], **more)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DRAWN])
def test_a_step_of_every_method_is_measured(script: Script, small_family: Any, method: str) -> None:
    module = script("sdxl_step")
    case = module.Case(method, 16, 2, 2, "none", "eager")
    row = module.attempt(module.measure, case, small_family, module.Device("cpu"), arguments())
    assert row["samples_per_second"] == pytest.approx(2 / row["step_seconds"])
    assert set(row["share"]) == {"data", "forward", "backward", "optimiser", "rest"}
    assert sum(row["share"].values()) == pytest.approx(1, abs=1e-3)
    assert min(row["share"][name] for name in ("forward", "backward", "optimiser")) > 0
    assert row["tflop_per_step"] > 0 and row["peak_gb"] > 0
    assert not hasattr(small_family.denoiser, "peft_config"), "the next row starts from a fresh network"


@pytest.mark.parametrize("method", sorted(DRAWN))
def test_a_method_that_draws_is_sent_elsewhere(script: Script, small_family: Any, tmp_path: Path, method: str) -> None:
    with pytest.raises(UserError, match="rl_rate"):
        script("sdxl_model").synthetic_trainer(method, small_family, tmp_path, resolution=16)


def test_rows_stand_beside_the_plain_loop_and_are_added_to_the_history(
    script: Script, tiny_sdxl_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module, out = script("sdxl_step"), tmp_path / "sdxl_step.json"
    monkeypatch.setattr(module.Device, "ceiling", lambda self: 1.0)
    words = ["--model", tiny_sdxl_path, "--device", "cpu", "--precision", "no", "--methods", "dpo", "sft"]
    words += ["--resolutions", "16", "--batch_sizes", "2", "--ranks", "2", "--checkpointing", "none", "selective"]
    words += ["--blocks", "mid_block", "--steps", "1", "--warmup", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["sdxl_step.py", *words])
    out.write_text('[{"earlier": 1}]')
    module.main()
    earlier, found = json.loads(out.read_text())
    assert earlier == {"earlier": 1}
    assert found["card"] == "CPU" and found["versions"]["torch"] and "--methods dpo sft" in found["command"]
    rows = {(row["method"], row["checkpointing"]): row for row in found["rows"]}
    assert set(rows) == {(m, c) for m in ("dpo", "sft") for c in ("none", "selective")}
    for kind in ("none", "selective"):
        dpo = rows["dpo", kind]
        assert dpo["ratio_to_plain"] == pytest.approx(dpo["samples_per_second"] / dpo["plain"]["samples_per_second"])
        assert "plain" not in rows["sft", kind]
    assert rows["dpo", "selective"]["tflop_per_step"] > rows["dpo", "none"]["tflop_per_step"], "it recomputes"
    tables = script("speed_tables")
    assert all(tables.step_row(row, 1.0)[0] in capsys.readouterr().out for row in found["rows"][:1])


def test_running_out_of_memory_is_a_row_too(script: Script, small_family: Any) -> None:
    module = script("sdxl_step")

    def too_much(*_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = module.Case("dpo", 16, 2, 2, "none", "eager")
    assert module.attempt(too_much, case, small_family) == {"out_of_memory": True}


@pytest.mark.parametrize("method", [name for name in METHODS if name in ("awm", "nft", "ddpo", "rwr")])
def test_whole_rollouts_are_measured(script: Script, tiny_sdxl_path: str, method: str) -> None:
    module = script("rl_rate")
    words = ["--methods", method, "--resolutions", "16", "--precision", "no", "--vae_precision", "no", "--rank", "2"]
    words += ["--prompts", "2", "--images_per_prompt", "4", "--inference_steps", "3", "--train_steps", "2"]
    words += ["--rollouts", "2", "--warmup", "0", "--device", "cpu", "--model", tiny_sdxl_path]
    if method == "ddpo":
        words += ["--guidance", "3", "--set", "num_updates_per_rollout=2"]
    args = module.parse(words)
    (row,) = module.run_all(args, script("sdxl_step").Device("cpu"))
    assert (row["method"], row["resolution"], row["images"]) == (method, 16, 8)
    assert row["images_per_second"] > 0 and sum(row["share"].values()) == pytest.approx(1, abs=1e-3)
    assert row["share"]["drawing"] > 0.05 and row["share"]["learning"] > 0.05


def test_a_method_without_rollouts_is_sent_elsewhere(script: Script, small_family: Any, tmp_path: Path) -> None:
    module = script("rl_rate")
    with pytest.raises(UserError, match="sdxl_step"):
        module.make_trainer(module.Case("dpo", 16, 2), small_family, tmp_path, {"num_prompts_per_rollout": 1})
