"""One of two processes dies or stops: the other ends with an error that says so, and the run goes on afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.training.processes import Presence, lost_contact

TIMEOUT = 8.0
SETTINGS = {
    "pretrained_model_name_or_path": "shapes-sdxl",
    "dataset_name": "shapes-pairs",
    "max_train_samples": "16",
    "max_train_steps": "400",
    "train_batch_size": "2",
    "checkpointing_steps": "2",
    "checkpoints_total_limit": "2",
    "rank": "2",
    "report_to": "none",
    "process_timeout": str(TIMEOUT / 60),
}


def start(folder: Path, rank: int, port: int, **more: str) -> subprocess.Popen[str]:
    """A process of two, started by hand: torchrun would end the other one itself."""
    flags = [f"--{name}={value}" for name, value in {**SETTINGS, **more}.items()]
    flags += [f"--output_dir={folder / 'run'}", f"--cache_dir={folder / 'cache'}"]
    world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **world, **address, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "diffalign", "train", "mapo", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def wait_for_checkpoint(folder: Path, processes: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 300
    while not list((folder / "run").glob("checkpoint-[0-9]*")):
        assert all(process.poll() is None for process in processes) and time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_other_process_ends_with_an_error_and_the_run_resumes(how: signal.Signals, tmp_path: Path) -> None:
    port = free_port()
    processes = [start(tmp_path, rank, port) for rank in (0, 1)]
    try:
        wait_for_checkpoint(tmp_path, processes)
        processes[1].send_signal(how)
        began = time.monotonic()
        _, said = processes[0].communicate(timeout=TIMEOUT + 120)
        took = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 1, said[-2000:]
    assert took < TIMEOUT + 60
    assert re.search(r"diffalign: error: process 0 of 2 lost contact with the others in step \d+", said), said[-2000:]
    assert f"process 1 (pid {processes[1].pid} on {socket.gethostname()}), which began step" in said
    newest = max(int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-[0-9]*"))
    assert f"goes on from checkpoint-{newest}" in said
    if how is signal.SIGSTOP:
        return
    port = free_port()
    more = {"resume_from_checkpoint": "latest", "max_train_steps": str(newest + 2)}
    again = [start(tmp_path, rank, port, **more) for rank in (0, 1)]
    said = "".join(process.communicate(timeout=300)[1] for process in again)
    assert [process.returncode for process in again] == [0, 0], said[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, newest + 3))
    assert not (tmp_path / "run" / ".processes").exists()


def test_who_is_behind_is_named(tmp_path: Path) -> None:
    for rank, step in ((1, 7), (2, 5), (3, 7)):
        Presence(tmp_path, rank, 4).note(step)
    text = str(Presence(tmp_path, 0, 4).error(RuntimeError("Connection closed by peer [::1]:1"), 7))
    assert "process 0 of 4 lost contact with the others in step 8 (Connection closed by peer" in text
    assert "process 2 (pid" in text and "began step 6" in text and "There is no checkpoint yet" in text
    silent = str(Presence(tmp_path, 0, 5).error(RuntimeError("x"), 7))
    assert "Process 4 has not begun a step" in silent
    Presence(tmp_path, 0, 4).leave()
    assert not list(tmp_path.iterdir())


def test_one_process_leaves_no_trace(tmp_path: Path) -> None:
    Presence(tmp_path, 0, 1).note(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.distributed.DistNetworkError("anything"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("Timed out waiting 8000ms for send operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (DiffalignError("connection closed by peer"), False),
    ],
)
def test_which_errors_are_of_an_exchange(error: BaseException, is_lost: bool) -> None:
    assert lost_contact(error) is is_lost
