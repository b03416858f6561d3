from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign import cli


def test_images_stand_before_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "white").save(f"{name}.png")
    words = ["--reward", "shapes-checker", "{reward: jpeg_compressibility, name: small}"]
    words += ["--prompts", "a red circle", "--out", "s.jsonl"]
    assert cli.main(["score", "a.png", "b.png", *words, "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["a.png", "b.png"]
    assert rows[0]["scores"].keys() == {"shapes-checker", "small"}
    assert "shapes-checker: mean" in capsys.readouterr().out
    assert cli.main(["score", "--images", "a.png", "b.png", *words, "--batch-size", "1"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "shapes-clip", "--out", "x.jsonl"], "which images?"),
        (["a.png", "--out", "x.jsonl"], "which reward?"),
        (["a.png", "--reward", "shapes-clip"], "'out' has no value"),
        (["nowhere", "--reward", "shapes-clip", "--out", "x.jsonl"], "nowhere: no such file or folder"),
    ],
)
def test_what_is_missing_is_asked_for(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", *words]) == 2
    assert message in capsys.readouterr().err
