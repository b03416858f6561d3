"""Judging a run by what it does not train on: what is best, and when to stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.training.heldout import Heldout, append_row, keep_best
from diffalign.training.online_config import PromptConfig

PROMPTS = 24


@pytest.fixture
def heldout(tmp_path: Path) -> Callable[..., Heldout]:
    """Makes one of 24 prompts with the rewards "own" (trained) and "judge"; keyword arguments are of the config."""

    def make(judges: tuple[str, ...] = ("judge",), trained: tuple[str, ...] = (), **own: Any) -> Heldout:
        file = tmp_path / "heldout.txt"
        file.write_text("".join(f"prompt {i}\n" for i in range(PROMPTS)))
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": "none",
            "output_dir": "none",
            "prompts": "shapes-train",
            "rewards": ["own"],
            "max_train_steps": 8,
            "heldout_prompts": str(file),
            "early_stop": True,
        }
        config = PromptConfig(**{**settings, **own})
        return Heldout(config, set(trained), lambda raw: raw["own"], judges)

    return make


def scores(mean: float, noise: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + noise * torch.randn(PROMPTS, generator=generator, dtype=torch.float64)


def run(held: Heldout, judge: Callable[[int], float], noise: float, evaluations: int, seed: int = 0) -> int | None:
    """Evaluations of a trained reward that rises by 1 each; returns the number that ended the run."""
    for n in range(evaluations):
        raw = {"own": scores(n, 0.1, seed + n), "judge": scores(judge(n), noise, 1000 + seed + n)}
        held.add(n, raw)
        if held.should_stop:
            return n
    return None


def test_noise_alone_does_not_end_a_run(heldout: Callable[..., Heldout]) -> None:
    ended = [run(heldout(), lambda n: 0.5, 0.3, 10, seed=100 * i) for i in range(6)]
    assert ended == [None] * 6


def test_a_judge_that_falls_ends_it_after_the_patience(heldout: Callable[..., Heldout]) -> None:
    assert run(heldout(), lambda n: 1.0 if n < 3 else 0.0, 0.3, 12) == 4
    assert run(heldout(early_stop_patience=3), lambda n: 1.0 if n < 3 else 0.0, 0.3, 12) == 5
    assert run(heldout(early_stop=False), lambda n: 1.0 if n < 3 else 0.0, 0.3, 12) is None


def test_a_judge_that_rises_or_a_run_that_fails_at_both_does_not(heldout: Callable[..., Heldout]) -> None:
    assert run(heldout(), lambda n: float(n), 0.3, 8) is None
    held = heldout()
    for n in range(6):  # Both fall: this is no over-optimisation, and the loss or the learning rate is to blame.
        held.add(n, {"own": scores(-n, 0.1, n), "judge": scores(-n, 0.1, 50 + n)})
    assert not held.should_stop and held.best is not None and held.best["step"] == 0


def test_judges_of_different_units_count_alike_in_one_unit_for_the_whole_run(heldout: Callable[..., Heldout]) -> None:
    held = heldout(judges=("small", "large"))
    small, large = scores(0.3, 0.1, 0), scores(50.0, 10.0, 1)
    own = scores(0, 1, 2)
    assert held.add(0, {"own": own, "small": small, "large": large})
    # Spreads shrink and means fall: no scale of an evaluation's own may make that an improvement.
    narrow = {"small": small.mean() - 0.05 + 0.1 * (small - small.mean()), "large": large * 0.2 + 39}
    assert not held.add(1, {"own": own, **narrow})
    assert held.add(2, {"own": own, "small": small + 0.05, "large": large})


def test_the_trained_reward_is_compared_in_one_unit(heldout: Callable[..., Heldout]) -> None:
    held = heldout()
    shift = [0.0]
    held.total = lambda raw: raw["own"] - shift[0]
    held.add(0, {"own": scores(0, 0.1, 0), "judge": scores(1, 0.1, 1)})
    for n in (1, 2):  # A running mean that follows the rising reward must not hide that it rises.
        shift[0] = 10.0 * n
        held.add(n, {"own": scores(n, 0.1, n), "judge": scores(0, 0.1, 10 + n)})
    assert held.should_stop


def test_images_without_a_score_are_left_out(heldout: Callable[..., Heldout]) -> None:
    held = heldout()
    hole = scores(1, 0.1, 0)
    hole[3] = torch.nan
    held.add(0, {"own": hole, "judge": hole})
    held.add(1, {"own": scores(2, 0.1, 1), "judge": scores(0, 0.1, 2)})
    assert held.worse_in_a_row == 1
    report = json.loads(json.dumps(held.report(held.history[-1]), allow_nan=False))
    assert report["change_since_start"]["judge"][2] < 0 and report["best_step"] == 0
    held.add(0, {"own": torch.full((PROMPTS,), torch.nan), "judge": hole})
    assert held.report(held.history[0])["change_since_start"]["trained"] is None


def test_what_was_judged_is_resumed(heldout: Callable[..., Heldout]) -> None:
    one, other = heldout(), heldout()
    run(one, lambda n: -float(n), 0.1, 2)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for held in (one, other):
        held.add(2, {"own": scores(5, 0.1, 5), "judge": scores(-3, 0.1, 6)})
    assert one.should_stop and other.should_stop and one.history == other.history


def test_prompts_that_are_trained_on_are_no_judges(heldout: Callable[..., Heldout]) -> None:
    assert len(heldout(trained=("prompt 0", "prompt 5", "other")).prompts) == PROMPTS - 2
    with pytest.raises(UserError, match="all 24 are prompts that are trained on"):
        heldout(trained=tuple(f"prompt {i}" for i in range(PROMPTS)))


def test_an_early_stop_needs_a_judge(heldout: Callable[..., Heldout]) -> None:
    with pytest.raises(UserError, match="eval_only: true"):
        heldout(judges=())
    with pytest.raises(UserError, match="another combine"):
        heldout(combine="vote")


def test_rows_of_a_run_that_went_further_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    for step, value in ((0, 1), (4, 2), (8, 3), (4, 4)):
        append_row(path, {"step": step, "value": value}, step)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "value": 1},
        {"step": 4, "value": 4},
    ]


def test_the_best_so_far_is_there_until_a_better_one_is_whole(tmp_path: Path) -> None:
    def export(text: str) -> Callable[[Path], Any]:
        return lambda folder: (folder / "weights").write_text(text)

    def dies(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    keep_best(tmp_path, export("first"), 4)
    with pytest.raises(OSError, match="disk full"):
        keep_best(tmp_path, dies, 8)
    assert (tmp_path / "best" / "weights").read_text() == "first"

    # As a run leaves it that is killed between the two renames.
    (tmp_path / "best").rename(tmp_path / ".best-before")
    with pytest.raises(OSError, match="disk full"):
        keep_best(tmp_path, dies, 8)
    assert (tmp_path / "best" / "weights").read_text() == "first"

    keep_best(tmp_path, export("second"), 8)
    assert (tmp_path / "best" / "weights").read_text() == "second"
    assert json.loads((tmp_path / "best" / "step.json").read_text()) == {"step": 8}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
