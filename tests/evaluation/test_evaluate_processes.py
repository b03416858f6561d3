"""The real command in processes of its own: killed outright at any point, and shared by two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffalign.config import parse_args
from diffalign.evaluation.eval_config import EvalConfig
from diffalign.evaluation.evaluate import run_eval

PROMPTS = [f"prompt {number}" for number in range(12)]
TOTAL = 2 * len(PROMPTS)
RESULTS = ("report.md", "summary.json", "scores.jsonl", "images.html", "examples.png")
REWARD = """
import os, time
from diffalign.rewards import Reward

class Slow(Reward):
    name, uses_prompt = "slow", True

    def score(self, images, prompts, metadata):
        with open(os.environ["SCORED"], "a") as log:
            log.write("".join(f"{os.getpid()} {prompt}\\n" for prompt in prompts))
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return images[:, 0].mean((1, 2))
"""


@pytest.fixture
def words(tiny_sdxl_path: str, lora_paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of a command, and where the reward writes what it scores."""
    (tmp_path / "slow.py").write_text(REWARD)
    monkeypatch.setenv("SCORED", str(tmp_path / "scored.txt"))
    flags = {
        "pretrained_model_name_or_path": [tiny_sdxl_path],
        "output_dir": [str(tmp_path / "out")],
        "models": [f"tuned={lora_paths[0]}"],
        "rewards": [f"{tmp_path / 'slow.py'}:Slow"],
        "prompts": PROMPTS,
        "num_inference_steps": ["6"],
        "batch_size": ["2"],
        "score_batch_size": ["2"],
        "bootstrap_draws": ["100"],
        "device": ["cpu"],
        "plots": ["false"],
    }
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


@pytest.fixture
def whole(words: list[str], tmp_path: Path) -> dict[str, bytes]:
    """What an evaluation that nobody disturbs leaves; its folder is moved out of the way."""
    assert run_eval(parse_args(EvalConfig, words)) is not None
    results = {name: (tmp_path / "out" / name).read_bytes() for name in RESULTS}
    (tmp_path / "out").rename(tmp_path / "whole")
    (tmp_path / "scored.txt").unlink()
    return results


def scored(tmp_path: Path) -> list[list[str]]:
    """(process, prompt) of every image that was scored."""
    file = tmp_path / "scored.txt"
    return [line.split(maxsplit=1) for line in file.read_text().splitlines()] if file.exists() else []


def killed_when(condition: Callable[[], bool], words: list[str]) -> None:
    """Run the command, and kill it with all it may be doing as soon as the condition holds."""
    command = [sys.executable, "-m", "diffalign", "eval", *words]
    process = subprocess.Popen(command, env={**os.environ, "PAUSE": "0.2"}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_outright_it_goes_on_with_what_is_there(
    words: list[str], whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def images() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sorted((out / "images").glob("*/images/*.png"))}

    killed_when(lambda: len(images()) >= 3, words)
    before = images()
    assert 3 <= len(before) < TOTAL
    killed_when(lambda: len(scored(tmp_path)) >= 6, words)
    # An image without its row was cut off between the two, and is drawn again: at most one.
    assert sum(images()[path] != time_ for path, time_ in before.items()) <= 1
    drawn, by_the_killed = images(), len(scored(tmp_path))
    assert len(drawn) == TOTAL and 6 <= by_the_killed < TOTAL
    assert run_eval(parse_args(EvalConfig, words)) is not None
    assert images() == drawn, "nothing is drawn twice"
    assert len(scored(tmp_path)) - TOTAL <= 2, "at most one batch is scored twice"
    assert {name: (out / name).read_bytes() for name in RESULTS} == whole


@pytest.mark.slow
def test_two_processes_share_drawing_and_scoring(words: list[str], whole: dict[str, bytes], tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, "-m", "diffalign", "eval", *words], check=True, timeout=600)
    done = scored(tmp_path)
    by_process = {process: sum(other == process for other, _ in done) for process, _ in done}
    assert sorted(by_process.values()) == [TOTAL // 2] * 2, "each image is scored once, by one of two"
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in RESULTS} == whole
