from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diffalign.data.write import PairRow, write_pairs
from diffalign.errors import UserError
from diffalign.labelling.items import Item, find_items


def ids(items: list[Item]) -> list[str]:
    return [item.id for item in items]


def test_two_models_meet_where_prompt_and_seed_are_equal(drawn: Callable[..., str]) -> None:
    folders = [drawn("base", 0, ["a", "b", "c"], (1, 2)), drawn("mine", 9, ["b", "c", "d"], (2, 3))]
    items = find_items(folders)
    assert [(item.prompt, item.seeds, item.models) for item in items] == [
        ("b", (2, 2), ("base", "mine")),
        ("c", (2, 2), ("base", "mine")),
    ]
    assert [image.data for image in items[0].images] == [
        Path(folders[0]) / "images/00001-2.png",
        Path(folders[1]) / "images/00000-2.png",
    ]
    assert [item.id for item in find_items(folders)] == [item.id for item in items]
    with pytest.raises(UserError, match="one seed"):
        find_items([folders[0], drawn("other", 3, ["a"], (9,))])


def test_the_folder_of_a_grid_with_its_scores(two_models: list[str], tmp_path: Path) -> None:
    rows = [
        {"file": f"{model}/images/00002-7.png", "scores": {"red": score, "blue": other}}
        for model, score, other in (("base", 0.25, 1.0), ("mine", 0.5, None))
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    items = find_items([str(tmp_path)])
    assert len(items) == 5
    assert {item.prompt: item.scores for item in items if item.scores} == {"a cross": {"red": (0.25, 0.5)}}
    assert ids(find_items(two_models)) == ids(items)
    more = tmp_path / "more.jsonl"
    more.write_text(
        "".join(
            json.dumps({"file": f"{folder}/images/00000-7.png", "scores": {"s": 1}}) + "\n" for folder in two_models
        )
    )
    found = find_items(two_models, scores=[str(more)])
    assert found[0].scores == {"s": (1.0, 1.0)} and found[2].scores == {"red": (0.25, 0.5)}
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        find_items(two_models, scores=[str(tmp_path / "nothing.jsonl")])


def test_candidates_of_one_model(drawn: Callable[..., str]) -> None:
    items = find_items([drawn("base", 0, ["a", "b"], (1, 2, 3))])
    assert [(item.prompt, item.seeds) for item in items[:4]] == [
        ("a", (1, 2)),
        ("a", (1, 3)),
        ("a", (2, 3)),
        ("b", (1, 2)),
    ]
    assert len(items) == 6
    with pytest.raises(UserError, match="num_images_per_prompt"):
        find_items([drawn("single", 0, ["a"], (1,))])


def test_some_at_random_and_none_of_equal_images(drawn: Callable[..., str], two_models: list[str]) -> None:
    few = find_items(two_models, max_pairs=2)
    assert len(few) == 2 and ids(few) == ids(find_items(two_models, max_pairs=2))
    assert set(ids(few)) < set(ids(find_items(two_models)))
    assert len({tuple(ids(find_items(two_models, max_pairs=2, seed=seed))) for seed in range(8)}) > 2
    with pytest.raises(UserError, match="equal images"):
        find_items([two_models[0], drawn("same", 0)])


def test_a_set_of_pairs(tmp_path: Path) -> None:
    files = []
    for shade in (0, 99):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / "x.png")
        files.append((tmp_path / "x.png").read_bytes())
    rows = [PairRow("p", files[0], files[1], 0.0), PairRow("q", files[0], files[1], 0.5)]
    write_pairs(tmp_path / "set" / "train.parquet", rows)
    items = find_items([str(tmp_path / "set")])
    assert [(item.prompt, item.label, item.models) for item in items] == [("p", 1.0, None), ("q", 0.5, None)]
    assert items[0].images[0].read() == files[1]
    with pytest.raises(UserError, match=r"set: no samples\.jsonl"):
        find_items([str(tmp_path / "set"), str(tmp_path / "set")])
