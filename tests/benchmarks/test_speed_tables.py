"""Tables of speed: what they show of records, and that a page is made whichever results are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]
MADE = {"machine": "a machine", "versions": {"torch": "1"}, "when": "now", "commit": "abc"}


def record(command: str, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {"model": "sdxl", "card": "A", "settings": {}, "ceiling_tflop_per_second": 200.0, "command": command}
    return {**MADE, **own, "rows": list(rows), **more}


def step(method: str, rate: float, **more: Any) -> dict[str, Any]:
    case = {"resolution": 1024, "batch_size": 2, "rank": 16, "checkpointing": "none", "mode": "eager"}
    share = {"data": 0.01, "forward": 0.5, "backward": 0.4, "optimiser": 0.06, "rest": 0.03}
    figures = {"peak_gb": 20.25, "share": share, "waiting_for_data": 0.011, "tflop_per_second": 50.0}
    return {"method": method, **case, "samples_per_second": rate, **figures, **more}


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row below a head."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    heads = {index + 1 for index, cells in enumerate(lines) if set(cells) == {"---"}}
    return [cells for index, cells in enumerate(lines) if index + 1 not in heads and index + 2 not in heads]


def test_a_step_is_shown_with_its_shares_and_ratios(script: Script) -> None:
    text = script("speed_tables").step_tables([record("python a", step("dpo", 3.456, ratio_to_plain=2.5))])
    first = ["dpo", "1024", "2", "16", "none", "eager"]
    assert table_rows(text) == [[*first, "3.46", "20.2", "1 / 50 / 40 / 6 / 3", "1.1 %", "50", "25 %", "2.50"]]
    assert "`sdxl` on A. A large matrix product reaches 200 TFLOP/s." in text
    assert "python a" in text and "a machine, now, commit abc. torch 1." in text


def test_the_latest_of_each_row_counts_and_cards_and_settings_stay_apart(script: Script) -> None:
    gone = {**step("mapo", 0), "out_of_memory": True}
    records = [
        record("python old", step("dpo", 1.0)),
        record("python first", step("dpo", 2.0), gone),
        record("python second", step("dpo", 3.0)),
        record("python other", step("dpo", 9.0), card="B"),
        record("python capped", step("dpo", 8.0), cap_gb=24),
        record("python two", step("dpo", 7.0), settings={"two_pass_gradient": True}),
    ]
    text = script("speed_tables").step_tables(records)
    shown = [(row[0], row[6]) for row in table_rows(text)]
    assert shown == [("dpo", "3"), ("mapo", "out of memory"), ("dpo", "9"), ("dpo", "8"), ("dpo", "7")]
    assert len({len(row) for row in table_rows(text)}) == 1
    assert "python old" not in text and "python first" in text and "python second" in text
    assert "at most 24 GB of its memory" in text and "`two_pass_gradient: True`" in text


def test_images_a_second_of_rollouts(script: Script) -> None:
    share = {"drawing": 0.4, "rewards": 0.05, "learning": 0.55}
    row = {"method": "awm", "resolution": 512, "batch_size": 4, "images_per_second": 4.321}
    rows = [{**row, "share": share, "peak_gb": 30.0}, {**row, "batch_size": 64, "out_of_memory": True}]
    shown = table_rows(script("speed_tables").rate_tables([record("python a", *rows)]))
    assert shown[0] == ["awm", "512", "4", "4.32", "40 %", "5 %", "55 %", "30.0"]
    assert shown[1][:4] == ["awm", "512", "64", "out of memory"] and len(shown[1]) == len(shown[0])


def test_starts_are_those_of_the_last_record_beside_their_targets(script: Script) -> None:
    def starts(seconds: float) -> dict[str, Any]:
        own = {"python": 0.02, "import diffalign": seconds, "diffalign --help": 0.5}
        rows = {name: {"seconds": value, "of_python": value / 0.02} for name, value in own.items()}
        targets = {"import diffalign": 0.3, "diffalign --help": 0.7}
        return {**MADE, "command": "python startup", "rounds": 7, "starts": rows, "targets": targets}

    shown = table_rows(script("speed_tables").startup_table([starts(0.1), starts(0.4)]))
    assert shown == [
        ["python", "0.02 s", "1.0", ""],
        ["import diffalign", "0.40 s", "20.0", "0.3 s, missed"],
        ["diffalign --help", "0.50 s", "25.0", "0.7 s"],
    ]


def test_estimates_are_shown_beside_what_was_measured(script: Script) -> None:
    case = {"predicted_mib": 110.0, "measured_mib": 100.0, "error": 0.1}
    result = {**MADE, "command": "python a", "cases": {"one": case}, "worst_error": 0.1}
    text = script("speed_tables").estimate_error_table(result)
    assert table_rows(text) == [["one", "110 MiB", "100 MiB", "+10.0%"]] and "published" not in text
    result["time"] = {"published_seconds": 3.31, "estimated_seconds": 3.19, "error": -0.036}
    assert "3.19 s estimated, 3.31 s published (-3.6%)" in script("speed_tables").estimate_error_table(result)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_page_is_made_whichever_results_are_there(
    script: Script, stored: bool, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = script("render_results")
    results = tmp_path / "results"
    results.mkdir()
    for name in ("estimate_error", "step_time") if stored else ():
        shutil.copy(render.RESULTS / f"{name}.json", results)
    if own:
        starts = {"python": {"seconds": 0.02, "of_python": 1.0}}
        startup = {**MADE, "command": "c", "rounds": 1, "starts": starts, "targets": {}}
        (results / "startup.json").write_text(json.dumps([startup]))
        (results / "sdxl_step.json").write_text(json.dumps([record("python a", step("dpo", 1.0))]))
    monkeypatch.setattr(render, "RESULTS", results)
    monkeypatch.setattr(render, "PAGE", tmp_path / "docs" / "results.md")
    render.main()
    page = (tmp_path / "docs" / "results.md").read_text()
    assert ("## A step at real size" in page) == ("## Starting" in page) == own
    assert ("## Estimates of memory" in page) == ("## The loop against" in page) == stored
