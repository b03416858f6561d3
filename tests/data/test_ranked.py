"""Ranked images become pairs."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from diffalign.data.ranked import ranked_pairs
from diffalign.data.readers import open_pairs
from diffalign.errors import UserError

RANK = [1, 2, 2, 4]


def picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shade(image):
    return image.decode().getpixel((0, 0))[0]


def test_which_pairs_a_list_gives():
    assert ranked_pairs(RANK, "all") == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert ranked_pairs(RANK, "adjacent") == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert ranked_pairs(RANK, "best-worst") == [(0, 3)]
    for which in ("all", "adjacent", "best-worst", "3"):
        assert ranked_pairs([2, 2], which) == []


def test_random_pairs_are_keyed_by_seed_and_list():
    drawn = ranked_pairs(RANK, "2", (0, "list"))
    assert len(drawn) == 2 and set(drawn) < set(ranked_pairs(RANK, "all"))
    assert drawn == ranked_pairs(RANK, "2", (0, "list"))
    assert len({tuple(ranked_pairs(RANK, "2", (0, str(i)))) for i in range(20)}) > 3
    assert ranked_pairs(RANK, "99", (0, "list")) == ranked_pairs(RANK, "all")


def rows():
    return [{"prompt": "p", "images": [picture(10 * i) for i in range(4)], "rank": RANK, "id": "list"}]


def test_lists_of_images_and_ranks():
    pairs = open_pairs(rows())
    assert [(shade(pair.chosen), shade(pair.rejected)) for pair in pairs] == [
        (0, 10),
        (0, 20),
        (0, 30),
        (10, 30),
        (20, 30),
    ]
    assert [pair.margin for pair in pairs] == [1.0, 1.0, 3.0, 2.0, 2.0]
    assert pairs[2].id == "list 0 3" and pairs[2].prompt == "p"
    assert "row 0, images 0 and 3" in pairs[2].where
    assert len(open_pairs(rows(), rankings="best-worst")) == 1


def test_of_scores_the_highest_wins():
    row = {"prompt": "p", "images": [picture(10), picture(20)], "scores": [0.1, 0.9]}
    pair = open_pairs([row])[0]
    assert (shade(pair.chosen), shade(pair.rejected)) == (20, 10)
    assert pair.margin == pytest.approx(0.8)


def test_a_row_for_each_image_as_in_imagerewarddb():
    data = [
        {"image": picture(i), "prompt": f"p{i // 3}", "prompt_id": f"list-{i // 3}", "rank": rank}
        for i, rank in enumerate([2, 1, 3, 1, 1, 2])
    ]
    pairs = open_pairs(data, rankings="adjacent")
    found = [(pair.prompt, shade(pair.chosen), shade(pair.rejected)) for pair in pairs]
    assert found == [("p0", 1, 0), ("p0", 0, 2), ("p1", 3, 5), ("p1", 4, 5)]


def test_hpd_test_lists_are_files_beside_the_list(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    row = {"prompt": "p", "image_path": ["0.png", "1.png", "2.png"], "rank": [3, 1, 2]}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    pair = open_pairs(tmp_path, split="test", rankings="best-worst")[0]
    assert (shade(pair.chosen), shade(pair.rejected)) == (1, 0)


def test_lists_of_encoded_images_in_parquet_are_looked_at_once(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    data = rows()
    data[0]["images"] = [{"bytes": content, "path": None} for content in data[0]["images"]]
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "rank": datasets.List(datasets.Value("int64")),
            "id": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(data, features=features).to_parquet(str(tmp_path / "train.parquet"))
    pairs = open_pairs(tmp_path)
    assert shade(pairs[2].rejected) == 30
    assert pairs.fingerprint() is not None
    assert pairs.fingerprint() != open_pairs(tmp_path, rankings="best-worst").fingerprint()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"rankings": "worst"}, "rankings: 'worst' is unknown. Choose all, adjacent"),
        ({"rank": [1, 2, None, 4]}, {"max_bad_rows": 0}, r"row 0: rank is \[1, 2, None, 4\], expected numbers"),
        ({"rank": [1, 1, 1, 1]}, {}, "0 pairs of 0 rows"),
        ({"prompt": None}, {"max_bad_rows": 0}, "the prompt is missing"),
    ],
)
def test_what_is_refused(change, options, message):
    with pytest.raises(UserError, match=message):
        list(open_pairs([rows()[0] | change], **options))


def test_images_without_a_list_to_belong_to_are_refused():
    data = [{"image": picture(i), "prompt": "p", "rank": i, "prompt_id": i} for i in range(3)]
    with pytest.raises(UserError, match="no list holds more than one image.*columns: {group: my_column}"):
        open_pairs(data)
