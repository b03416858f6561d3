"""The regression guard: which ratios it takes from results, and when it complains."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def guard() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("guard")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_slower_is_more_than_the_tolerance_or_above_a_bound(guard: ModuleType) -> None:
    now = {"same": 1.0, "a little": 1.09, "slower": 1.11, "new": 5.0, "bounded": 1.06, "faster": 0.5}
    stored = {"same": 1.0, "a little": 1.0, "slower": 1.0, "bounded": 1.05, "faster": 1.0, "gone": 1.0}
    found = guard.compare(now, stored, 0.1, {"bounded": 1.05})
    assert [f.name for f in found if f.slower] == ["slower", "bounded"]
    assert [f.name for f in found if f.stored is None] == ["new"]


def row(method: str, rate: float, **more: Any) -> dict[str, Any]:
    case = {"resolution": 64, "batch_size": 8, "rank": 16, "checkpointing": "none", "mode": "eager"}
    return {"method": method, **case, "samples_per_second": rate, "peak_gb": 2.0, **more}


def test_ratios_of_a_step_are_of_the_same_model_and_card_and_the_latest_ones(guard: ModuleType) -> None:
    def record(model: str, card: str, *rows: dict[str, Any]) -> dict[str, Any]:
        return {"model": model, "card": card, "rows": list(rows)}

    records = [
        record("sdxl", "A", row("dpo", 1.0, ratio_to_plain=2.0), row("mapo", 1.5)),
        record("sdxl", "A", row("dpo", 1.0, ratio_to_plain=4.0), {"method": "awm", "out_of_memory": True}),
        record("sdxl", "B", row("dpo", 1.0, ratio_to_plain=9.0)),
        record("shapes-sdxl", "A", row("dpo", 1.0, ratio_to_plain=9.0)),
    ]
    assert guard.over_plain("sdxl", "A")(records) == {
        "dpo 64 8 16 none eager: time over the plain loop": 0.25,
        "mapo 64 8 16 none eager: time over dpo": pytest.approx(1 / 1.5),
        "mapo 64 8 16 none eager: memory over dpo": 1.0,
    }
    assert guard.over_plain("sdxl", "C")(records) == {}


def test_it_reads_every_result_that_is_stored(guard: ModuleType) -> None:
    for name, one in guard.guards().items():
        path = BENCHMARKS / "results" / one.stored
        assert (BENCHMARKS / one.command[0]).exists(), name
        if path.exists():
            assert all(value > 0 for value in one.figures(json.loads(path.read_text())).values()), name


def test_it_ends_with_1_where_something_is_slower(
    guard: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = guard.Finding("loop over a bare loop", 1.2, 1.0, True)
    monkeypatch.setattr(guard, "measure", lambda one: [found])
    monkeypatch.setattr(sys, "argv", ["guard.py", "--only", "step_time"])
    assert guard.main() == 1
    assert "slower than stored: loop over a bare loop" in capsys.readouterr().out
    monkeypatch.setattr(guard, "measure", lambda one: [guard.Finding("x", 1.0, None, False)])
    assert guard.main() == 0
