"""The demo: trains, draws, judges, and says where things are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.app import demo
from diffalign.errors import UserError


def test_the_demo_ends_with_a_grid_and_a_win_rate(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    words = ["--output_dir", str(tmp_path / "demo"), "--max_train_steps", "1", "--num_prompts", "3", "--num_rows", "2"]
    assert demo.main(words) == 0
    said = capsys.readouterr().out
    grid = Path(re.search(r"^grid (.+)$", said, re.MULTILINE).group(1))  # type: ignore[union-attr]
    assert Image.open(grid).width > 300
    assert re.search(r"by the annotators win rate \d\.\d\d \[\d\.\d\d, \d\.\d\d\] \(n=3", said)
    assert (tmp_path / "demo" / "run" / "pytorch_lora_weights.safetensors").exists()
    with pytest.raises(UserError, match="holds another run"):
        demo.main(words)


def test_more_rows_than_prompts_is_an_error() -> None:
    with pytest.raises(UserError, match="num_rows"):
        demo.DemoConfig(num_prompts=4, num_rows=5)
