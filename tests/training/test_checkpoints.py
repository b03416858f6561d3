"""Checkpoints are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.training.checkpoints import STATE_FILE, find_checkpoints, resolve_checkpoint, save_checkpoint


def write(folder: Path) -> None:
    (folder / "weights").write_text("w")


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def test_a_checkpoint_appears_whole(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, {"step": 5}, write)
    assert names(tmp_path) == ["checkpoint-5"]
    assert names(path) == [STATE_FILE, "weights"]


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        save_checkpoint(tmp_path, step, {"step": step}, write, limit=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1}, write)

    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        save_checkpoint(tmp_path, 2, {"step": 2}, fail, limit=1)
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no space left.*checkpoints_total_limit"):
        save_checkpoint(tmp_path, 1, {"step": 1}, full)
    assert names(tmp_path) == []


def test_killed_in_the_middle_of_a_save_the_last_checkpoint_stays_the_latest(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from diffalign.training.checkpoints import save_checkpoint
out = Path({str(tmp_path)!r})
save_checkpoint(out, 1, {{"step": 1}}, lambda folder: (folder / "weights").write_text("w"))
def killed(folder):
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(out, 2, {{"step": 2}}, killed)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    latest = resolve_checkpoint(tmp_path, "latest")
    assert latest is not None and latest.name == "checkpoint-1"
    save_checkpoint(tmp_path, 3, {"step": 3}, write)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"], "what the killed save left is removed by the next"


def test_a_folder_without_its_state_file_does_not_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1}, write)
    (tmp_path / "checkpoint-7").mkdir()
    assert resolve_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    with pytest.raises(UserError, match="checkpoint-7.*not a complete checkpoint.*checkpoint-1"):
        resolve_checkpoint(tmp_path, "checkpoint-7")


def test_a_checkpoint_can_be_named_by_its_folder_or_its_path(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 4, {"step": 4}, write)
    assert resolve_checkpoint(tmp_path, "checkpoint-4") == path
    assert resolve_checkpoint(Path("elsewhere"), os.fspath(path)) == path
