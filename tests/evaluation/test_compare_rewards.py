from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from diffalign.errors import UserError
from diffalign.evaluation.compare_rewards import CompareConfig, agreement, judged, run_compare


def choices(scale: float, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, 2) and choices made by Bradley-Terry's rule of ``scale`` times the difference."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(n, 2))
    first = rng.uniform(size=n) < 1 / (1 + np.exp(-scale * (scores[:, 0] - scores[:, 1])))
    return scores, first.astype(float)


def test_a_reward_that_people_choose_by_is_calibrated_and_its_temperature_found() -> None:
    scores, labels = choices(2.0)
    found = judged(scores, labels, [None] * len(labels))
    assert found["temperature"] == pytest.approx(0.5, rel=0.1)
    assert found["calibration_error"] < 0.03
    assert (
        found["accuracy"]["low"] < np.mean((scores[:, 0] > scores[:, 1]) == (labels == 1)) < found["accuracy"]["high"]
    )


def test_a_reward_that_knows_nothing_has_log_2_and_half() -> None:
    scores, labels = choices(0.0)
    found = judged(scores, labels, ["a", "b"] * (len(labels) // 2))
    assert found["log_loss"] == pytest.approx(np.log(2), abs=5e-3)
    assert found["accuracy"]["low"] < 0.5 < found["accuracy"]["high"]
    assert abs(found["spearman_with_labels"]) < 0.05 and set(found["by_user"]) == {"a", "b"}


def test_agreement_by_hand_and_by_scipy() -> None:
    a = np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 5.0], [4.0, 3.5], [np.nan, 1.0]])
    b = np.array([[0.0, 1.0], [2.0, 1.0], [5.0, 3.0], [4.0, 3.0], [0.0, 1.0]])
    labels = np.array([1.0, 1.0, 1.0, 0.5, 1.0])
    (row,) = agreement({"a": a, "b": b}, labels, "holm")
    assert (row["only_a_right"], row["only_b_right"], row["same_choice"], row["p_adjusted"]) == (1, 1, 0.5, 1.0)
    both = np.isfinite(a.ravel())
    assert row["spearman"] == pytest.approx(spearmanr(a.ravel()[both], b.ravel()[both]).statistic)


def test_on_pairs_of_the_shapes_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CompareConfig(
        pairs="shapes-pairs",
        split="heldout",
        max_pairs=24,
        rewards=["shapes-annotator", "shapes-checker"],
        output_dir=str(tmp_path),
        device="cpu",
    )
    first = run_compare(config)
    assert first["rewards"]["shapes-annotator"]["accuracy"]["rate"] > 0.6
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and len(rows[0]["scores"]["shapes-checker"]) == 2
    report = (tmp_path / "report.md").read_bytes()
    assert b"## Agreement" in report and b"diffalign compare-rewards" in report
    assert run_compare(config) == first and (tmp_path / "report.md").read_bytes() == report
    with pytest.raises(UserError, match="which rewards"):
        CompareConfig(pairs="shapes-pairs", output_dir=str(tmp_path))
