"""The demo: trains, draws, judges, and ends with the report of `diffalign eval`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from diffalign.app import demo
from diffalign.errors import UserError


def test_the_demo_ends_with_the_report_of_an_evaluation(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    words = ["--output_dir", str(tmp_path / "demo"), "--max_train_steps", "1", "--num_prompts", "2"]
    assert demo.main(words) == 0
    said = capsys.readouterr().out
    report = Path(re.search(r"^report +(.+)$", said, re.MULTILINE).group(1))  # type: ignore[union-attr]
    text, summary = report.read_text(), json.loads(report.with_name("summary.json").read_text())
    assert "dpo against base" in text and "![" in text and "loss from 0.6931" in text
    assert [(r["name"], r["role"]) for r in summary["rewards"]] == [
        ("shapes-annotator", "trained on"),
        ("shapes-checker", "held out"),
    ]
    assert summary["prompts"] == 2 and summary["images_of_each_model"] == 4 and len(summary["models"]) == 6
    for picture in re.findall(r"\]\((.+\.png)\)", text):
        assert (report.parent / picture).is_file()
    page = report.with_name("images.html")
    assert str(page) in said and page.read_text(encoding="utf-8").count("data:image/png") == 4 * 6
    assert re.search(r"shapes-annotator: .*dpo against base .*win rate \d\.\d\d \[\d\.\d\d, \d\.\d\d\]", said)
    assert (tmp_path / "demo" / "run" / "pytorch_lora_weights.safetensors").exists()
    with pytest.raises(UserError, match="holds another run"):
        demo.main(words)


def test_no_prompts_are_an_error() -> None:
    with pytest.raises(UserError, match="num_prompts"):
        demo.DemoConfig(num_prompts=0)
