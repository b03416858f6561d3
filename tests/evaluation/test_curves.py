from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.evaluation.curves import against, over_optimised, read_curves


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten steps in which the trained reward rises, while the held-out one turns at step 4."""
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = [{"step": s, "loss": None, "reward": s / 10, "reward/a": s, "kl": s * s} for s in range(1, 11)]
    heldout = [{"step": s, "heldout/b": -abs(s - 4.0), "best_step": 4} for s in range(0, 11, 2)]
    for name, rows in (("metrics.jsonl", metrics), ("heldout.jsonl", heldout)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_curves_of_a_run(run: Path) -> None:
    (curves,) = read_curves([run])
    assert set(curves.trained) == {"reward", "reward/a"}
    assert curves.heldout == {"b": [(0, -4.0), (2, -2.0), (4, 0.0), (6, -2.0), (8, -4.0), (10, -6.0)]}
    assert "loss" not in curves.metrics
    name, kl = curves.kl
    assert name == "kl" and against([(2, 5.0)], kl) == [(4.0, 5.0)]


def test_where_a_held_out_reward_turns_while_the_trained_one_rises(run: Path) -> None:
    (curves,) = read_curves([run])
    assert over_optimised(curves.trained["reward"], curves.heldout["b"]) == 4
    falling = [(step, -value) for step, value in curves.trained["reward"]]
    assert over_optimised(falling, curves.heldout["b"]) is None
    assert over_optimised(curves.trained["reward"], curves.heldout["b"][:3]) is None


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_curves([tmp_path])
