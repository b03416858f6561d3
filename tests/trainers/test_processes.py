"""Several processes are one run: the same losses at the same effective batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffalign.trainers import load_method

# One process group for all runs: start-up is most of the time of a short one.
ALL_AT_ONCE = """
import json, sys
from accelerate import Accelerator
from diffalign.cli import main
Accelerator.end_training = lambda self: None
sys.exit(max(main(["train", *arguments]) for arguments in json.loads(sys.argv[1])))
"""


def train_by(processes: int, folder: Path, runs: list[list[str]]) -> None:
    """Train each of ``runs``, the words after ``diffalign train``, with so many processes."""
    script = folder / "all.py"
    script.write_text(ALL_AT_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launch([*torchrun, str(script), json.dumps(runs)])


def launch(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    pairs = ((name, value if isinstance(value, list) else [value]) for name, value in settings.items())
    return [word for name, values in pairs for word in (f"--{name}", *map(str, values))]


OFFLINE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "dpo": ("dpo", {"beta_dpo": 500}, ("margin", "chosen_error")),
    # Each image is recomputed within the backward pass, which must count as one for the exchange of gradients.
    "two passes": ("dpo", {"beta_dpo": 500, "two_pass_gradient": True}, ("margin", "chosen_error")),
    # kl is estimated on the images of both processes, or the losses would differ from the second step on.
    "kto": ("kto", {"beta_kto": 100, "kl_ema_decay": 0.5}, ("kl", "liked_gain", "right_side")),
    "lcd": ("lcd", {"use_ema": True}, ("distillation_noisy", "distance_to_image")),
    # Through the decoder, whose chunks are decoded again in the backward pass. Very noisy images have no reward,
    # so the processes ask it about different numbers of them.
    "rg_lcd": (
        "rg_lcd",
        {"rewards": ["shapes-clip"], "reward_scale": 0.2, "reward_max_timestep": 599, "decode_batch_size": 1},
        ("distillation", "reward", "saturated_pixels"),
    ),
    # Three of four images teach the proxy, and need not be spread evenly over the processes.
    "proxy": (
        "rg_lcd",
        {"rewards": ["shapes-clip"], "proxy": "shapes-clip", "proxy_learning_rate": 1e-5, "proxy_batch_size": 3},
        ("proxy_reward", "proxy_loss", "proxy_accuracy", "proxy_grad_norm", "reward"),
    ),
}
"""Method, settings and metrics to compare, of each case."""


def test_two_gloo_processes_give_the_losses_of_one(tiny_sdxl_path: str, pairs_folder: Path, tmp_path: Path) -> None:
    def settings(case: str, batch: int, folder: str) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": tiny_sdxl_path,
            "dataset_name": str(pairs_folder),
            "cache_dir": str(tmp_path / f"cache-{folder}"),
            "resolution": 16,
            "max_train_steps": 4,
            "train_batch_size": batch,
            "learning_rate": 1e-3,
            "rank": 2,
            "checkpointing_steps": 2,
            "report_to": ["none"],
            "output_dir": str(tmp_path / folder / case),
            **OFFLINE[case][1],
        }

    for case in OFFLINE:
        config_class, trainer_class = load_method(OFFLINE[case][0])
        trainer_class(config_class(**settings(case, 4, "one"))).train()
    train_by(2, tmp_path, [[OFFLINE[case][0], *words(settings(case, 2, "two"))] for case in OFFLINE])
    for case in OFFLINE:
        one, two = (metrics(tmp_path / folder / case) for folder in ("one", "two"))
        assert len({row["loss"] for row in one}) > 2, f"{case}: the losses must move, or the comparison shows nothing"
        for name in ("loss", "grad_norm", *OFFLINE[case][2]):
            assert [r[name] for r in two] == pytest.approx([r[name] for r in one], abs=1e-4), (case, name)


ONLINE: dict[str, dict[str, Any]] = {
    "ddpo": {"num_updates_per_rollout": 2, "kl_beta": 0.1, "advantage": "tracker", "tracker_min_count": 2},
    "rwr": {"num_updates_per_rollout": 1, "num_prompts_per_rollout": 1},
    "awm": {"num_updates_per_rollout": 2, "num_images_per_prompt": 4},
    "nft": {"num_updates_per_rollout": 2},
    # Two steps with gradient: two passes through the network before one backward pass, recomputed within it.
    "reward_gradient": {"gradient_steps": 2, "gradient_accumulation_steps": 2, "kl_beta": 0.1},
}


@pytest.mark.parametrize(
    ("processes", "methods"), [(2, tuple(ONLINE)), pytest.param(4, ("ddpo", "awm"), marks=pytest.mark.slow)]
)
def test_gloo_processes_learn_from_rewards_as_one(
    processes: int, methods: tuple[str, ...], online_settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def settings(method: str, batch: int, folder: str) -> dict[str, Any]:
        chosen = online_settings(
            rewards=[f"{tmp_path}/rewards.py:Red"],
            # One prompt: with several processes all but one have nothing to judge.
            heldout_prompts="shapes-heldout",
            num_heldout_prompts=1,
            evaluation_steps=2,
            train_batch_size=batch,
            report_to=["none"],
            output_dir=str(tmp_path / folder / method),
        )
        if method == "reward_gradient":
            chosen = {name: value for name, value in chosen.items() if not name.startswith("num_") or "inf" in name}
            chosen["num_heldout_prompts"] = 1
        return {**chosen, **ONLINE[method]}

    for method in methods:
        config_class, trainer_class = load_method(method)
        trainer_class(config_class(**settings(method, 4, "one"))).train()
    train_by(processes, tmp_path, [[method, *words(settings(method, 4 // processes, "many"))] for method in methods])
    timed = ("seconds", "per_second")
    for method in methods:
        one, many = (metrics(tmp_path / folder / method) for folder in ("one", "many"))
        assert len({row["grad_norm"] for row in one}) > 2, "the runs must move, or the comparison shows nothing"
        for name in one[-1]:
            if not name.endswith(timed):
                assert [r[name] for r in many] == pytest.approx([r[name] for r in one], abs=1e-4), (method, name)
        judged = [(tmp_path / folder / method / "heldout.jsonl").read_text().count("\n") for folder in ("one", "many")]
        assert judged == [3, 3]
