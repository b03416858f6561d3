"""Single images with labels, from every source of them."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image

from diffalign.data.cache import build_cache
from diffalign.data.geometry import Geometry
from diffalign.data.items import encode_on_the_fly
from diffalign.data.labelled import open_images
from diffalign.data.readers import open_pairs
from diffalign.errors import UserError

datasets = pytest.importorskip("datasets")


def picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shade(image):
    return image.decode().getpixel((0, 0))[0]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def cached(tmp_path, fake):
    """Items of a source: (shade is lost) labels by id."""

    def build(data, **options):
        source = open_images(data, **options)
        return build_cache(source, fake.Family(), tmp_path / "cache", geometry=Geometry(16), progress=False)

    return build


def labels(items):
    return {name: round(float(label), 3) for name, label in zip(items.ids, items.numbers["label"], strict=True)}


def kto_rows(*marks):
    return [{"prompt": f"p{i}", "image": picture(i), "label": mark} for i, mark in enumerate(marks)]


def test_likes_and_dislikes():
    images = list(open_images(kto_rows(True, False, 1, 0, 0.7), keep="labelled"))
    assert [image.label for image in images] == [1.0, 0.0, 1.0, 0.0, 0.7]
    assert [image.id for image in images] == ["0", "1", "2", "3", "4"]
    assert shade(images[3].image) == 3 and images[3].prompt == "p3" and images[3].weight == 1.0


@pytest.mark.parametrize(
    ("both", "kept"), [("liked", [1.0, 0.0, 1.0]), ("disliked", [1.0, 0.0, 0.0]), ("drop", [1.0, 0.0])]
)
def test_the_splits_of_diffusion_kto(both, kept, caplog):
    values = ("exclusive_win", "exclusive_lose", "intersections")
    rows = [{"caption": "p", "file_name": picture(i), "split": value} for i, value in enumerate(values)]
    assert [image.label for image in open_images(rows, keep="labelled", both=both)] == kept
    if both == "drop":
        assert "1 images both liked and disliked dropped" in caplog.text


def test_a_column_split_of_another_meaning_is_no_label():
    rows = [{"caption": "p", "image": picture(1), "split": "train"}]
    assert open_images(rows)[0].label is None
    with pytest.raises(UserError, match="0 images of 1 rows; 1 rows without a label dropped"):
        open_images(rows, keep="labelled")


def test_captions_alone_and_weights(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    rows = [{"file_name": f"{i}.png", "text": f"p{i}", "weight": i / 2} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images = list(open_images(tmp_path, keep="liked"))
    assert [(shade(image.image), image.prompt, image.weight) for image in images] == [
        (0, "p0", 0.0),
        (1, "p1", 0.5),
        (2, "p2", 1.0),
    ]


def test_images_beside_captions(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "1.txt").write_text("one\n")
    source = open_images(tmp_path)
    assert [image.prompt for image in source] == ["one"]
    assert "0.png: the prompt is missing" in source.bad_rows.reasons[0]


def test_disliked_undecided_and_unlabelled_rows_are_counted(caplog):
    assert len(open_images(kto_rows(1, 0, 0.5, None), keep="liked")) == 2
    assert "1 disliked images dropped; 1 undecided images dropped" in caplog.text
    assert len(open_images(kto_rows(1, 0, 0.5, None), keep="labelled")) == 2
    assert "1 rows without a label dropped" in caplog.text


def tar(path, samples):
    with tarfile.open(path, "w") as file:
        for key, members in samples.items():
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def test_webdataset_of_pairs(tmp_path):
    meta = {"caption": "p", "label_0": 0.0, "label_1": 1.0}
    samples = {
        f"{i:04}": {"jpg_0.jpg": picture(i), "jpg_1.jpg": picture(10 + i), "json": json.dumps(meta).encode()}
        for i in range(3)
    }
    tar(tmp_path / "train-0000.tar", samples)
    pairs = open_pairs(tmp_path)
    assert [(shade(pair.chosen), shade(pair.rejected), pair.prompt) for pair in pairs] == [
        (10 + i, i, "p") for i in range(3)
    ]
    assert [image.label for image in open_images(tmp_path)] == [1.0, 0.0] * 3


def test_webdataset_of_images_and_texts(tmp_path):
    tar(tmp_path / "train.tar", {f"{i:02}": {"png": picture(i), "txt": f"p{i}".encode()} for i in range(2)})
    images = list(open_images(tmp_path))
    assert [(image.id, shade(image.image), image.prompt) for image in images] == [("00", 0, "p0"), ("01", 1, "p1")]
    (tmp_path / "train.tar").write_bytes(b"no tar at all")
    with pytest.raises(UserError, match="cannot be read"):
        open_images(tmp_path / "train.tar")


def pairs(*rows):
    return [
        {"prompt": prompt, "chosen": picture(a), "rejected": picture(b), "id": str(i)}
        for i, (prompt, a, b) in enumerate(rows)
    ]


def test_pairs_give_two_images_each():
    images = list(open_images(pairs(("p", 1, 2), ("q", 3, 4))))
    assert [(image.id, shade(image.image), image.label) for image in images] == [
        ("0 chosen", 1, 1.0),
        ("0 rejected", 2, 0.0),
        ("1 chosen", 3, 1.0),
        ("1 rejected", 4, 0.0),
    ]
    assert [shade(image.image) for image in open_images(pairs(("p", 1, 2), ("q", 3, 4)), keep="liked")] == [1, 3]


def test_images_of_pairs_take_their_own_captions_and_soft_labels():
    row = pairs(("p", 1, 2))[0] | {"chosen_prompt": "", "rejected_prompt": None, "label": 0.75}
    assert [(image.prompt, image.label) for image in open_images([row])] == [("", 0.75), ("p", 0.25)]


CHAIN = (("p", 1, 2), ("p", 2, 3), ("p", 1, 3), ("q", 2, 1))
"""Of p: 1 wins twice, 2 wins and loses, 3 loses twice. Of q: 2 wins, 1 loses."""


@pytest.mark.parametrize(
    ("both", "expected"),
    [
        ("liked", {"0 chosen": 1, "0 rejected": 1, "1 rejected": 0, "3 chosen": 1, "3 rejected": 0}),
        ("disliked", {"0 chosen": 1, "0 rejected": 0, "1 rejected": 0, "3 chosen": 1, "3 rejected": 0}),
        ("drop", {"0 chosen": 1, "1 rejected": 0, "3 chosen": 1, "3 rejected": 0}),
    ],
)
def test_equal_images_of_a_prompt_are_one(cached, both, expected):
    assert labels(cached(pairs(*CHAIN), keep="labelled", both=both)) == expected
    liked = {name for name, label in expected.items() if label}
    if both == "liked":
        liked = {"0 chosen", "1 chosen", "3 chosen"}  # losers are not even looked at, so image 2 is met as a winner
    assert set(cached(pairs(*CHAIN), keep="liked", both=both).ids) == liked


def test_without_merging_every_row_counts(cached):
    assert len(cached(pairs(*CHAIN), merge=False)) == 8
    assert len(cached(pairs(*CHAIN), merge=False, keep="liked")) == 4


def test_rankings_can_be_taken_one_by_one(cached):
    row = {"prompt": "p", "images": [picture(i) for i in range(3)], "rank": [1, 2, 3]}
    assert sorted(labels(cached([row], both="drop")).values()) == [0.0, 1.0]


def test_items_of_single_images(tmp_path, fake):
    rows = kto_rows(1, 0, 1)
    rows[1]["weight"] = 2.0
    source = open_images(rows, keep="labelled")
    items = build_cache(source, fake.Family(), tmp_path, geometry=Geometry(16), progress=False)
    assert set(items[1]) == {"id", "sizes", "label", "weight", "latents", "text"}
    assert items[1]["latents"].shape == (3, 2, 2) and items[1]["sizes"].tolist() == [16, 16, 0, 0, 16, 16]
    assert (items[1]["label"], items[1]["weight"]) == (0.0, 2.0)
    assert items.numbers["weight"].tolist() == [1.0, 2.0, 1.0]
    live = encode_on_the_fly(source, Geometry(16), tmp_path, progress=False)
    assert live[1]["images"].shape == (3, 16, 16) and live[1]["prompt"] == "p1"
    assert live[1]["id"] == items[1]["id"]


def test_pairs_and_their_images_share_latents(tmp_path, fake):
    family, data = fake.Family(), pairs(("p", 1, 2), ("q", 3, 4))
    build_cache(open_pairs(data), family, tmp_path, geometry=Geometry(16), progress=False)
    assert family.images == 4
    items = build_cache(open_images(data), family, tmp_path, geometry=Geometry(16), progress=False)
    assert family.images == 4 and len(items) == 4


@pytest.mark.parametrize("data", [kto_rows(1, 0, 1, 1), pairs(("p", 1, 2), ("p", 1, 3))])
def test_streams(tmp_path, fake, data):
    stream = datasets.Dataset.from_list(data).to_iterable_dataset()
    streamed = build_cache(
        open_images(stream, keep="labelled"), fake.Family(), tmp_path, geometry=Geometry(16), progress=False
    )
    plain = build_cache(
        open_images(data, keep="labelled"), fake.Family(), tmp_path, geometry=Geometry(16), progress=False
    )
    assert labels(streamed) == labels(plain)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"image": b"", "prompt": "p"}, {"keep": "labelled"}, "does not say which images are liked.*diffalign pairs"),
        ({"prompt": "p"}, {}, r"no column for image \(image, jpg.*Columns found: prompt"),
        ({"image": b"", "prompt": "p", "label": 3}, {}, r"row 0: label is 3, outside \[0, 1\]. A label says whether"),
        (
            {"image": b"", "prompt": "p", "weight": -1},
            {"max_bad_rows": 0},
            "row 0: weight is -1; a weight is",
        ),
        ({"image": b"", "prompt": None}, {"max_bad_rows": 0}, "row 0: the prompt is missing"),
        ({"image": b"", "prompt": "p", "label": 0}, {"keep": "liked"}, "1 disliked images dropped. There is nothing"),
        ({"image": b"", "prompt": "p"}, {"columns": {"lable": "x"}}, "unknown field 'lable'. Did you mean 'label'"),
    ],
)
def test_what_is_refused(row, options, message):
    with pytest.raises(UserError, match=message):
        open_images([row], **options)
