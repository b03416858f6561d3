from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from diffalign import cli
from diffalign.rewards import registry


def test_the_list_names_every_reward(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["rewards", "list"]) == 0
    assert capsys.readouterr().out == shown
    lines = shown.splitlines()
    assert lines[0].split() == ["name", "range", "gradient", "GB", "licence", "measures"]
    assert [line.split()[0] for line in lines[1 : 1 + len(registry.names())]] == registry.names()
    (line,) = [line for line in lines if line.startswith("hpsv2.1 ")]
    assert line.split()[1:6] == ["0.1", "to", "0.4", "yes", "1.97"] and "people prefer" in line


def test_cards_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards", "list", "--json"]) == 0
    cards = {card["name"]: card for card in json.loads(capsys.readouterr().out)}
    assert sorted(cards) == registry.names()
    assert cards["aesthetic"]["uses_prompt"] is False and cards["aesthetic"]["hacks"]
    assert cli.main(["rewards", "show", "aesthetic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == cards["aesthetic"]


def test_one_card_says_how_it_is_hacked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards", "show", "pickscore"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for hack in registry.card("pickscore").hacks:
        assert hack in shown
    assert "usual mean 15 to 28" in shown and "needed" in shown


def test_a_reward_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        'def bright(images, prompts, metadata):\n    """How bright it is."""\n    return images.mean((1, 2, 3))\n'
    )
    assert cli.main(["rewards", "show", f"{file}:bright"]) == 0
    assert "How bright it is." in capsys.readouterr().out
    assert cli.main(["rewards", "show", "pikscore"]) == 2
    assert "Did you mean 'pickscore'" in capsys.readouterr().err


def test_a_broken_package_does_not_hide_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("theirs", "no_such_package:Reward", registry.GROUP)

    def points(**wanted: Any) -> EntryPoints:
        return EntryPoints([point]).select(**wanted)

    monkeypatch.setattr(registry, "entry_points", points)
    assert cli.main(["rewards"]) == 0
    shown = capsys.readouterr().out
    assert "theirs cannot be used: " in shown and "'no_such_package'" in shown and "pickscore" in shown


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from diffalign.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for words in (["rewards", "--help"], ["serve-reward", "--help"]):
        assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=300).returncode == 0
