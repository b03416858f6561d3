from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.data.readers import open_pairs
from diffalign.errors import UserError
from diffalign.evaluation import sampling
from diffalign.making.pairs import PairsConfig, run_pairs
from diffalign.making.scoring import Scores

REWARD = """
import numpy as np

def brightness(images, prompts, metadata):
    return [float(image.mean()) for image in images]

def redness(images, prompts, metadata):
    return [float(image[0].mean() - image[1:].mean()) for image in images]

def calls(images, prompts, metadata):
    with open(__file__ + '.log', 'a') as log:
        log.write('x' * len(images))
    return brightness(images, prompts, metadata)

def constant(images, prompts, metadata):
    return [1.0] * len(images)
"""


@pytest.fixture
def reward(tmp_path: Path) -> str:
    """Path of a file with rewards."""
    (tmp_path / "mine.py").write_text(REWARD)
    return str(tmp_path / "mine.py")


def config(model: str, out: Path, rewards: list[Any], **settings: Any) -> PairsConfig:
    values = {"prompts": ["one", "two", "three"], "num_images_per_prompt": 3, "num_inference_steps": 1}
    values |= {"guidance_scale": 1.0, "batch_size": 4, "device": "cpu"}
    return PairsConfig(
        pretrained_model_name_or_path=model, output_dir=str(out), rewards=rewards, **(values | settings)
    )


def scores_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.with_suffix(".scores.jsonl").read_text().splitlines()]


def test_pairs_are_the_best_and_the_worst_of_each_prompt(tiny_sd_path: str, reward: str, tmp_path: Path) -> None:
    path = run_pairs(config(tiny_sd_path, tmp_path / "out", [f"{reward}:brightness"], select="best-worst"))
    rows = scores_of(path)
    assert len(rows) == 9 and len({row["seed"] for row in rows}) == 9
    pairs = open_pairs(tmp_path / "out")
    assert [pair.prompt for pair in pairs] == ["one", "two", "three"]
    for pair in pairs:
        own = [row["total"] for row in rows if row["prompt"] == pair.prompt]
        assert pair.label == 1.0 and pair.margin == pytest.approx(max(own) - min(own))
        levels = [np.asarray(image.decode()).mean() / 255 for image in (pair.chosen, pair.rejected)]
        assert levels == pytest.approx([max(own), min(own)], abs=1e-5)


def test_a_killed_run_draws_and_scores_nothing_twice(
    tiny_sd_path: str, reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    original = sampling.iterate_images

    def counted(pipe: Any, prompts: Any, seeds: Any, **settings: Any) -> Any:
        if len(drawn) >= 8:
            raise KeyboardInterrupt
        drawn.extend(seeds)
        return original(pipe, prompts, seeds, **settings)

    whole = run_pairs(config(tiny_sd_path, tmp_path / "whole", [f"{reward}:calls"]))
    log = Path(reward + ".log")
    assert len(log.read_text()) == 9
    log.unlink()
    monkeypatch.setattr(sampling, "iterate_images", counted)
    with pytest.raises(KeyboardInterrupt):
        run_pairs(config(tiny_sd_path, tmp_path / "killed", [f"{reward}:calls"]))
    assert len(drawn) == 8 and not log.exists()
    drawn[:] = drawn[8:]
    killed = run_pairs(config(tiny_sd_path, tmp_path / "killed", [f"{reward}:calls"]))
    assert len(drawn) == 1 and len(log.read_text()) == 9
    assert killed.read_bytes() == whole.read_bytes()
    killed.unlink()
    again = run_pairs(config(tiny_sd_path, tmp_path / "killed", [f"{reward}:calls"]))
    assert len(drawn) == 1 and len(log.read_text()) == 9
    assert again.read_bytes() == whole.read_bytes()


def test_other_selections_share_the_images(tiny_sd_path: str, reward: str, tmp_path: Path) -> None:
    first = config(tiny_sd_path, tmp_path, [f"{reward}:brightness", f"{reward}:redness"], select="all")
    assert len(open_pairs(run_pairs(first))) == 9
    with pytest.raises(UserError, match="--split NAME"):
        run_pairs(config(tiny_sd_path, tmp_path, [f"{reward}:brightness"], select="all"))
    settings: list[dict[str, Any]] = [
        {"max_pairs_per_prompt": 2, "split": "capped"},
        {"agree": 2, "split": "agreed"},
        {"margin": 1.5, "margin_unit": "sigma", "split": "wide"},
        {"num_images_per_prompt": 2, "split": "fewer"},
    ]
    counts = {}
    for own in settings:
        path = run_pairs(config(tiny_sd_path, tmp_path, first.rewards, select="all", **own))
        counts[own["split"]] = len(open_pairs(path))
    assert counts["capped"] == 6 and counts["fewer"] == 3
    assert 0 < counts["agreed"] <= 9 and 0 < counts["wide"] < 9
    assert len(list((tmp_path / "samples" / "images").iterdir())) == 9


def test_no_pair_is_an_error_that_says_why(tiny_sd_path: str, reward: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 prompts without a pair"):
        run_pairs(config(tiny_sd_path, tmp_path / "out", [f"{reward}:constant"]))
    assert not (tmp_path / "out" / "train.parquet").exists()
    with pytest.raises(UserError, match="cannot judge prompt 0"):
        run_pairs(config(tiny_sd_path, tmp_path / "b", ["shapes-checker"]))
    assert not (tmp_path / "b" / "samples").exists()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_images_per_prompt": 1}, "two images"),
        ({"seeds": [3]}, "two images"),
        ({"margin": -1.0}, "margin"),
        ({"agree": 2}, "agree"),
        ({"max_pairs_per_prompt": 0}, "max_pairs_per_prompt"),
        ({"split": "a/b"}, "not a path"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        config("model", tmp_path, ["shapes-checker"], **settings)


def test_only_scorers_that_count_vote() -> None:
    total = np.array([0.0, 1.0])
    scores = Scores(total, {"a": total, "judge": -total}, ("a",))
    assert scores.voters().tolist() == [[0.0, 1.0]]
    own = config("model", Path("out"), ["a", "judge"], agree=2)
    assert own.choose(Scores(total, scores.raw, ("a", "judge"))) == []
    assert len(config("model", Path("out"), ["a"]).choose(scores)) == 1
