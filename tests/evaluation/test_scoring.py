from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.evaluation.folder import read_rows
from diffalign.evaluation.scoring import ScoreConfig, run_score
from diffalign.rewards import Reward, RewardError, register, registry

SCORED: list[int] = []
"""Red values (0 to 255) of the images that the reward "red" was given, in order."""

KILLED_AT: set[int] = set()


def red(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
    values = images[:, 0, 0, 0]
    SCORED.extend((values * 255).round().int().tolist())
    if KILLED_AT & set(SCORED):
        raise KeyboardInterrupt
    if (values == 0).any():
        raise RuntimeError("too dark")
    return values


class Length(Reward):
    """Length of the prompt; an even one cannot be scored."""

    name = "length"

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    def check_prompts(self, prompts: Any) -> None:
        if "" in prompts:
            raise UserError("an empty prompt has no length")


class Best(Reward):
    """1 for the reddest image of its prompt, else 0."""

    name = "best"
    mode = "groupwise"
    uses_prompt = False

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]], group_ids: list[int]
    ) -> Tensor:
        values = [round(value * 255) for value in images[:, 0, 0, 0].tolist()]
        SCORED.extend(values)
        tops = {g: max(v for v, other in zip(values, group_ids, strict=True) if other == g) for g in group_ids}
        return torch.tensor([float(v == tops[g]) for v, g in zip(values, group_ids, strict=True)])


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    SCORED.clear()
    register("red", red)
    register("length", Length)
    register("best", Best)


@pytest.fixture
def images(scratch: Path) -> Path:
    """Ten images, 20.png to 29.png, as red as they are called, of three sizes; prompts 1, 22 and 333."""
    folder = scratch / "images"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as stream:
        for value in range(20, 30):
            Image.new("RGB", (8 + value % 3, 9), (value, 0, 0)).save(folder / f"{value}.png")
            prompt = str(value % 3 + 1) * (value % 3 + 1)
            stream.write(json.dumps({"file_name": f"{value}.png", "prompt": prompt}) + "\n")
    return folder


def config(**changes: Any) -> ScoreConfig:
    values: dict[str, Any] = {"images": ["images"], "reward": ["red"], "out": "scores.jsonl", "batch_size": 3}
    return ScoreConfig(**{**values, "device": "cpu", **changes})


def scores(name: str = "red", path: str = "scores.jsonl") -> list[Any]:
    return [row["scores"].get(name) for row in read_rows(Path(path))]


def test_scores_of_several_rewards(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summaries = run_score(config(reward=["red", "length"]))
    rows = read_rows(Path("scores.jsonl"))
    assert [row["file"] for row in rows] == [f"images/{value}.png" for value in range(20, 30)]
    assert [row["prompt"] for row in rows[:3]] == ["333", "1", "22"]
    assert scores() == pytest.approx([value / 255 for value in range(20, 30)])
    assert all(
        np.float32(score) == np.float32(value / 255) for score, value in zip(scores(), range(20, 30), strict=True)
    )
    assert scores("length") == [3, 1, 2] * 3 + [3]
    assert rows[0]["scorers"]["red"].startswith("red/1/") and "errors" not in rows[0]
    assert (summaries[1].mean, summaries[1].median, summaries[1].n, summaries[1].failed) == (2.1, 2, 10, 0)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:] == [str(summaries[0]), "length: mean 2.1, median 2, n 10, failed 0", "scores.jsonl"]


def test_a_killed_run_scores_nothing_twice(images: Path) -> None:
    run_score(config(out="whole.jsonl"))
    SCORED.clear()
    KILLED_AT.add(24)
    with pytest.raises(KeyboardInterrupt):
        run_score(config())
    KILLED_AT.clear()
    assert len(scores()) == 3, "the batch before"
    with Path("scores.jsonl").open("a") as stream:
        stream.write('{"file": "images/23.png", "sco')
    SCORED.clear()
    run_score(config())
    assert sorted(SCORED) == [*range(23, 30)]
    assert Path("scores.jsonl").read_text() == Path("whole.jsonl").read_text()
    SCORED.clear()
    run_score(config())
    assert SCORED == []


def test_another_reward_is_added_and_changed_images_are_scored_again(images: Path) -> None:
    run_score(config())
    run_score(config(reward=["length"]))
    assert len(SCORED) == 10 and scores()[0] == pytest.approx(20 / 255) and scores("length")[0] == 3
    SCORED.clear()
    Image.new("RGB", (9, 9), (200, 0, 0)).save(images / "24.png")
    run_score(config(reward=["red", "length"]))
    assert SCORED == [200] and scores()[4] == pytest.approx(200 / 255)
    run_score(config(prompts=["x"]))
    assert len(SCORED) == 11 and "length" not in read_rows(Path("scores.jsonl"))[0]["scores"]


def test_groups_stay_together(images: Path) -> None:
    run_score(config(reward=["best", "red"], batch_size=2))
    assert scores("best") == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    rows = Path("scores.jsonl").read_text().splitlines(keepends=True)
    Path("scores.jsonl").write_text("".join(rows[:-1]))
    SCORED.clear()
    run_score(config(reward=["best"]))
    assert sorted(SCORED) == [20, 23, 26, 29], "the whole group of the image that lacked a score"


def test_a_table(images: Path) -> None:
    Image.new("RGB", (9, 9)).save(images / "29.png")
    run_score(config(out="scores.csv", reward=["red", "length"], on_failure="drop"))
    with Path("scores.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert table[0] == {"file": "images/20.png", "prompt": "333", "red": "0.078431375", "length": "3.0", "error": ""}
    assert table[9]["red"] == "" and table[9]["error"] == "red: RuntimeError: too dark"
    SCORED.clear()
    run_score(config(out="scores.csv", on_failure="drop"))
    assert SCORED == [0], "only what failed is tried again"


@pytest.mark.parametrize(("spoilt", "message"), [(b"no image", "24.png cannot be decoded"), (b"", "24.png is empty")])
def test_an_image_that_cannot_be_read_is_named(images: Path, spoilt: bytes, message: str) -> None:
    (images / "24.png").write_bytes(spoilt)
    for policy in ("stop", "retry"):
        with pytest.raises(UserError, match=f"{message}.*--on_failure drop"):
            run_score(config(on_failure=policy))
    assert len(scores()) == 3, "what was scored before is kept"
    (summary,) = run_score(config(on_failure="drop"))
    assert (summary.n, summary.failed) == (9, 1)
    row = read_rows(Path("scores.jsonl"))[4]
    assert row["scores"] == {"red": None} and message in row["errors"]["red"]
    Image.new("RGB", (9, 9), (24, 0, 0)).save(images / "24.png")
    (summary,) = run_score(config())
    assert (summary.n, summary.failed) == (10, 0) and "errors" not in read_rows(Path("scores.jsonl"))[4]


def test_policies_for_what_cannot_be_scored(images: Path) -> None:
    Image.new("RGB", (9, 9)).save(images / "25.png")
    with pytest.raises(RewardError, match="image images/25.png .*too dark"):
        run_score(config())
    assert len(scores()) == 3
    (summary,) = run_score(config(on_failure="drop"))
    assert (summary.n, summary.failed) == (9, 1) and scores()[5] is None
    for value in range(20, 30):
        Image.new("RGB", (9, 9)).save(images / f"{value}.png")
    with pytest.raises(RewardError, match="could not score"):
        run_score(config(on_failure="drop", overwrite=True))


@pytest.mark.parametrize(
    ("before", "changes", "message"),
    [
        ("", {"reward": ["rde"]}, "Did you mean 'red'"),
        ("", {"out": "scores.txt"}, ".jsonl or .csv"),
        ("", {"out": "nowhere/scores.csv"}, "the folder nowhere for the scores does not exist"),
        ("", {"prompts": [""], "reward": ["length"]}, "an empty prompt"),
        ("", {"images": ["bare"]}, "needs the prompts.*1 of 1 have none, such as bare/1.png.*--prompts"),
        ('{"step": 1}', {}, "something else than scores"),
        ('{"file": "x.png", "scores": {}}', {}, "1 images that are not among those given, such as x.png.*--overwrite"),
        ('{"file": "images/20.png", "scores": {}, "scorers": {"red": "red/0/a"}}', {}, "scores of red by red/0/a"),
        ("table", {"out": "table.csv"}, "table.csv exists, without the table.jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_scored(
    images: Path, before: str, changes: dict[str, Any], message: str
) -> None:
    (images.parent / "bare").mkdir()
    Image.new("RGB", (9, 9)).save("bare/1.png")
    Path("table.csv").write_text("x")
    if before.startswith("{"):
        Path("scores.jsonl").write_text(before + "\n")
    with pytest.raises(UserError, match=message):
        run_score(config(**changes))
    assert SCORED == []
    if before.startswith("{"):
        assert Path("scores.jsonl").read_text() == before + "\n"
        run_score(config(overwrite=True))
        assert len(scores()) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "which images"),
        ({"reward": []}, "which reward"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"on_failure": "ignore"}, "on_failure"),
        ({"max_failed_share": 2.0}, "max_failed_share"),
    ],
)
def test_wrong_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)
