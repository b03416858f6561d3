from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from diffalign.rewards import RewardError, load_reward
from diffalign.rewards.failures import FailurePolicy, guarded
from diffalign.rewards.remote.client import RemoteReward

SLOW = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent

def slow(images, prompts, metadata):
    '''Mean of the red channel; the first call says who it is and takes its time.'''
    if not (HERE / "pid").exists():
        (HERE / "pid").write_text(str(os.getpid()))
        time.sleep(60)
    return images[:, 0].mean((1, 2))
"""


def kill_when_it_scores(file: Path) -> None:
    while not (file.exists() and file.read_text()):
        time.sleep(0.05)
    os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_a_server_in_another_interpreter_is_started_again_when_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    reward = load_reward(
        "remote", python=sys.executable, reward=f"{tmp_path}/mine.py:slow", device="cpu", backoff_seconds=0.01
    )
    assert isinstance(reward, RemoteReward)
    killer = threading.Thread(target=kill_when_it_scores, args=(tmp_path / "pid",))
    killer.start()
    batch = torch.full((3, 3, 8, 8), 0.2)
    output = guarded(reward, batch, "x", policy=FailurePolicy("stop"))
    killer.join()
    assert output.rewards.tolist() == pytest.approx([0.2] * 3)
    assert reward.identity.startswith("slow/1/")
    assert reward._spawned is not None and reward._spawned._process is not None
    process = reward._spawned._process
    assert process.stdin is not None
    process.stdin.close()  # as when this process ends, however it ends
    assert process.wait(timeout=120) == 0
    reward.close()


def test_an_interpreter_without_diffalign(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    reward = load_reward("remote", python=python, reward="red")
    with pytest.raises(RewardError, match="ended with code 3 before it listened.*diffalign must be installed"):
        reward(torch.zeros(1, 3, 8, 8), "x")
