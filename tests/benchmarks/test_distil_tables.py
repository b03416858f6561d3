"""Tables of few-step students, and what a student with a reward is compared with."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

Script = Callable[[str], ModuleType]


def record(name: str, seed: int | None, steps: int, checker: float, **more: Any) -> dict[str, Any]:
    scores = {"reward": 20.0, "checker": checker, "annotator": 9.0, "fine_power": 0.002, "spectrum": [0.1, 0.01]}
    return {"name": name, "seed": seed, "steps": steps, "strength": 1.0, **scores, "diversity": 0.1, **more}


@pytest.fixture
def result() -> dict[str, Any]:
    true = {"reward": 25.0, "checker": 1.0, "annotator": 12.0, "fine_power": 0.001, "spectrum": [0.1, 0.001]}
    wins = {"win_rate": [0.6, 0.5, 0.7]}
    return {
        "records": [
            record("teacher", None, 50, 0.84),
            *(record("lcd", seed, 2, checker, **wins) for seed, checker in enumerate((0.6, 0.7))),
            *(record("rg_lcd", s, 2, 0.8, **wins, win_rate_plain=[0.55 + s / 10, 0.5, 0.7]) for s in range(2)),
            record("rg_lcd", 0, 2, 0.9, **wins) | {"strength": 0.8},
        ],
        "references": {"renderings": true},
        "frequencies": [0.1, 0.4],
        "seconds": {"teacher 50": 0.5, "student 2": 0.01},
        "images": 8,
        "diverse": [2, 4],
        "teacher_guidance": 4.0,
        "command": "python a",
        "machine": "a machine",
        "versions": {"torch": "1"},
    }


def test_rows_are_means_over_seeds(
    result: dict[str, Any], script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tables = script("distil_tables")
    monkeypatch.setattr(tables, "PICTURE", tmp_path / "spectrum.svg")
    lines = tables.distil_tables(result).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| | from | steps | seeds"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[head + 2 : head + 7]]
    names = [cell.strip() for cell in lines[head].split("|")[1:-1]]
    teacher, plain, guided, later, true = (dict(zip(names, row, strict=True)) for row in rows)
    assert (plain["from"], guided["from"], later["from"], teacher["from"]) == ("999", "999", "799", "")
    assert later["seeds"] == "1" and later["checker"] == "0.900", "other starts have rows of their own"
    assert teacher["time an image"] == "500.0 ms" and teacher["against LCD"] == "" and teacher["seeds"] == ""
    assert plain["checker"] == "0.650 [0.600, 0.700]" and plain["against LCD"] == "" and plain["seeds"] == "2"
    assert plain["wins against the teacher at 50"] == "0.600 [0.600, 0.600]"
    assert guided["against LCD"] == "0.600 [0.550, 0.650]" and guided["fine power"] == "2.00 [2.00, 2.00]"
    assert true["checker"] == "1.000" and true["fine power"] == "1.00" and true["time an image"] == ""
    assert (tmp_path / "spectrum.svg").is_file()
    assert "| LCD | 999 | 2 | 0 | 0.600 [0.500, 0.700] |  |" in lines
    assert "| RG-LCD through the decoder | 999 | 2 | 1 | 0.600 [0.500, 0.700] | 0.650 [0.500, 0.700] |" in lines


def test_a_student_with_a_reward_meets_the_plain_one_of_its_seed_and_steps(script: Script, tmp_path: Path) -> None:
    bench = script("shapes_distil").Bench.__new__(script("shapes_distil").Bench)
    bench.args = Namespace(runs=tmp_path)
    for name in ("lcd-0", "rg_lcd-0", "rg_lcd-1"):
        (tmp_path / name).mkdir()
    assert bench.against_plain("lcd", 0, 2, 1.0, np.array([1.0, 2.0, 3.0, 4.0])) == {}
    against = bench.against_plain("rg_lcd", 0, 2, 1.0, np.array([2.0, 3.0, 3.0, 3.0]))
    assert against["win_rate_plain"][0] == (2 + 0.5) / 4
    assert json.loads((tmp_path / "rg_lcd-0" / "utilities-2-1.json").read_text()) == [2, 3, 3, 3]
    assert bench.against_plain("rg_lcd", 0, 4, 1.0, np.zeros(4)) == {}, "LCD was not drawn in 4 steps"
    assert bench.against_plain("rg_lcd", 0, 2, 0.8, np.zeros(4)) == {}, "LCD was not drawn from there"
    assert bench.against_plain("rg_lcd", 1, 2, 1.0, np.zeros(4)) == {}, "LCD has no such seed"


def test_every_way_of_a_step_has_a_name_in_its_table(script: Script) -> None:
    measured = {"bare_seconds": 1.0, "loop_seconds": 1.1, "ratio": 1.1, "ratio_quartiles": [1.0, 1.2]}
    peaks = {"bare_peak_mib": 1000, "loop_peak_mib": 1100}
    about = {"card": "CPU", "machine": "a machine", "versions": {"torch": "1"}, "command": "python a"}
    ways = dict.fromkeys(script("distil_step").WAYS, measured | peaks)
    text = script("distil_tables").distil_step_table({"ways": ways, "batch_size": 8, "rounds": 2, **about})
    assert text.count("1.100 [1.000, 1.200] | 1,000 MiB | 1,100 MiB |") == len(ways) == 3
