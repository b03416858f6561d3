"""The error of estimates that is stated is the one that was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diffalign.estimation.cards import load_calibration

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "estimate_error.json"

Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def test_the_results_are_of_all_cases_and_add_up(results: dict[str, Any], script: Script) -> None:
    assert list(results["cases"]) == list(script("estimate_error").CASES)
    for row in results["cases"].values():
        assert row["error"] == pytest.approx(row["predicted_mib"] / row["measured_mib"] - 1)
    assert results["worst_error"] == max(abs(row["error"]) for row in results["cases"].values())
    time = results["time"]
    assert time["error"] == pytest.approx(time["estimated_seconds"] / time["published_seconds"] - 1)


def test_the_command_states_the_errors_of_the_results(results: dict[str, Any]) -> None:
    stated = load_calibration()
    assert stated.memory_error == round(results["worst_error"], 3)
    assert stated.time_error == round(abs(results["time"]["error"]), 3)


def test_the_page_states_the_errors_of_the_results(results: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "estimate.md").read_text()
    assert f"at most {100 * results['worst_error']:.1f} % |" in page
    time = results["time"]
    assert f"{time['estimated_seconds']:.2f} s, {-100 * time['error']:.1f} % less" in page


def test_only_the_time_can_be_brought_up_to_date(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out = script("estimate_error"), tmp_path / "out.json"
    out.write_text('{"cases": {}, "time": 1}')
    monkeypatch.setattr(module, "published", lambda: {"error": 0.5})
    monkeypatch.setattr("sys.argv", ["estimate_error.py", "--published", "--out", str(out)])
    module.main()
    assert json.loads(out.read_text()) == {"cases": {}, "time": {"error": 0.5}}


@pytest.mark.slow
def test_the_time_is_still_what_is_estimated(results: dict[str, Any], script: Script) -> None:
    assert script("estimate_error").published() == pytest.approx(results["time"], rel=1e-3)
