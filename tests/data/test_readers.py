"""Every layout gives the same pairs, and bad input is named by file, row and remedy."""

from __future__ import annotations

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from diffalign.data.readers import open_pairs
from diffalign.errors import UserError

datasets = pytest.importorskip("datasets")

RED, BLUE = (200, 0, 0), (0, 0, 200)


def picture(color, size=(16, 16), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def color_of(image):
    return tuple(int(value) for value in np.asarray(image.decode())[0, 0])


def pick_rows(labels=((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0))):
    return [
        {
            "caption": f"prompt {index}",
            "jpg_0": picture(RED),
            "jpg_1": picture(BLUE),
            "label_0": first,
            "label_1": second,
            "has_label": bool(first + second),
            "user_id": 7,
        }
        for index, (first, second) in enumerate(labels)
    ]


def save_parquet(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path


def test_pick_a_pic_ties_dropped(caplog):
    with caplog.at_level(logging.INFO, "diffalign"):
        pairs = open_pairs(pick_rows())
    assert [pair.prompt for pair in pairs] == ["prompt 0", "prompt 1"]
    assert [color_of(pair.chosen) for pair in pairs] == [RED, BLUE]
    assert [color_of(pair.rejected) for pair in pairs] == [BLUE, RED]
    assert [pair.label for pair in pairs] == [1.0, 1.0]
    assert pairs[0].user_id == "7"
    assert "2 pairs of 4 rows; 1 ties dropped; 1 rows without a label dropped" in caplog.text


def test_pick_a_pic_ties_kept(caplog):
    with caplog.at_level(logging.INFO, "diffalign"):
        pairs = open_pairs(pick_rows(), ties="keep")
    assert [pair.label for pair in pairs] == [1.0, 1.0, 0.5]
    assert [pair.id for pair in pairs] == ["0", "1", "2"]
    assert "1 ties kept with label 0.5" in caplog.text


def test_ties_error_names_the_row():
    with pytest.raises(UserError, match=r"row 2: a tie.*drop \| keep"):
        open_pairs(pick_rows(), ties="error")


def test_no_pairs_left():
    with pytest.raises(UserError, match=r"0 pairs of 1 rows; 1 ties dropped.*ties: keep"):
        open_pairs(pick_rows([(0.5, 0.5)]))


def test_soft_labels_put_the_preferred_picture_first():
    pairs = open_pairs(pick_rows([(0.8, 0.2), (0.3, 0.7)]))
    assert [color_of(pair.chosen) for pair in pairs] == [RED, BLUE]
    assert [pair.label for pair in pairs] == pytest.approx([0.8, 0.7])


def test_ids_do_not_shift_when_ties_are_dropped():
    rows = pick_rows([(0.5, 0.5), (1.0, 0.0)])
    assert [pair.id for pair in open_pairs(rows)] == ["1"]
    assert [pair.id for pair in open_pairs([row | {"id": "x"} for row in rows])] == ["x"]


def test_folder_of_parquet_with_splits(tmp_path):
    save_parquet(pick_rows(), tmp_path / "set" / "train.parquet")
    save_parquet(pick_rows([(0.0, 1.0)]), tmp_path / "set" / "heldout.parquet")
    assert len(open_pairs(tmp_path / "set")) == 2
    heldout = open_pairs(str(tmp_path / "set"), split="heldout")
    assert [color_of(pair.chosen) for pair in heldout] == [BLUE]
    with pytest.raises(UserError, match=r"no split 'held_out'. Did you mean 'heldout'\? Splits found: heldout, train"):
        open_pairs(tmp_path / "set", split="held_out")


def test_sharded_parquet_names_file_and_row(tmp_path):
    save_parquet(pick_rows([(1.0, 0.0)] * 3), tmp_path / "data" / "train-00000-of-00002.parquet")
    save_parquet(pick_rows([(1.0, 0.0), (3.0, 0.0)]), tmp_path / "data" / "train-00001-of-00002.parquet")
    with pytest.raises(UserError, match=r"train-00001-of-00002.parquet row 1: label_0 is 3.0, outside.*rescale"):
        open_pairs(tmp_path)


def test_damaged_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"train.parquet: cannot be read.*Write it again"):
        open_pairs(tmp_path)


def test_saved_to_disk_and_arrow(tmp_path):
    data = datasets.Dataset.from_list(pick_rows())
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "splits")
    assert len(open_pairs(tmp_path / "plain")) == 2
    assert len(open_pairs(tmp_path / "splits", split="test")) == 1
    arrow = next((tmp_path / "plain").glob("*.arrow"))
    assert [pair.prompt for pair in open_pairs(arrow)] == ["prompt 0", "prompt 1"]


def test_datasets_image_feature_is_not_decoded():
    rows = [
        {"prompt": "p", "chosen": {"bytes": picture(RED), "path": None}, "rejected": {"bytes": b"x", "path": None}}
    ]
    image = datasets.Image()
    features = datasets.Features({"prompt": datasets.Value("string"), "chosen": image, "rejected": image})
    pair = open_pairs(datasets.Dataset.from_list(rows, features=features))[0]
    assert color_of(pair.chosen) == RED
    assert pair.rejected.data == b"x"


def test_streaming(caplog):
    stream = datasets.Dataset.from_list(pick_rows()).to_iterable_dataset()
    pairs = open_pairs(stream)
    with caplog.at_level(logging.INFO, "diffalign"):
        assert [color_of(pair.chosen) for pair in pairs] == [RED, BLUE]
    assert [pair.id for pair in pairs] == ["0", "1"]
    assert "2 pairs of 4 rows; 1 ties dropped" in caplog.text


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_jsonl_with_relative_paths(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(RED))
    (tmp_path / "images" / "b.png").write_bytes(picture(BLUE))
    row = {"prompt": "p", "chosen": "images/a.png", "rejected": "images/b.png", "margin": 2.0}
    jsonl(tmp_path / "metadata.jsonl", [row, row | {"label": 0.25}])
    first, second = open_pairs(tmp_path)
    assert (color_of(first.chosen), first.label, first.margin) == (RED, 1.0, 2.0)
    assert (color_of(second.chosen), second.label, second.margin) == (BLUE, 0.75, -2.0)


def test_jsonl_errors_name_the_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}\n\n{"prompt": \n')
    with pytest.raises(UserError, match=r"pairs.jsonl line 3: not valid JSON"):
        open_pairs(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match=r"pairs.jsonl line 1: expected an object"):
        open_pairs(path)


def test_missing_image_file_names_line_and_file(tmp_path):
    jsonl(tmp_path / "metadata.jsonl", [{"prompt": "p", "chosen": "gone.png", "rejected": "gone.png"}])
    with pytest.raises(UserError, match=r"metadata.jsonl line 1, column chosen: cannot read .*gone.png.*relative to"):
        open_pairs(tmp_path)[0].chosen.decode()


def test_hpd_lists(tmp_path):
    rows = [{"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [0, 1]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    pair = open_pairs(tmp_path)[0]
    assert (pair.chosen.data, pair.rejected.data) == (tmp_path / "b.png", tmp_path / "a.png")


def test_two_folders(tmp_path):
    for side, color in (("chosen", RED), ("rejected", BLUE)):
        (tmp_path / side).mkdir()
        for stem in ("a", "b"):
            (tmp_path / side / f"{stem}.png").write_bytes(picture(color))
    (tmp_path / "chosen" / "a.txt").write_text("a cat\n")
    (tmp_path / "chosen" / "b.txt").write_text("a dog")
    (tmp_path / "rejected" / "b.txt").write_text("half a dog")
    pairs = list(open_pairs(tmp_path))
    assert [(pair.prompt, pair.chosen_prompt, pair.rejected_prompt) for pair in pairs] == [
        ("a cat", None, None),
        ("a dog", "a dog", "half a dog"),
    ]
    assert [color_of(pair.rejected) for pair in pairs] == [BLUE, BLUE]


def test_two_folders_without_a_caption(tmp_path, caplog):
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        for stem in ("a", "b"):
            (tmp_path / side / f"{stem}.png").write_bytes(picture(RED))
    (tmp_path / "chosen" / "a.txt").write_text("")
    assert [pair.prompt for pair in open_pairs(tmp_path)] == [""]
    assert "stem 'b': the prompt is missing" in caplog.text


def test_dcpo_captions_follow_their_pictures():
    rows = [row | {"caption_0": "zero", "caption_1": "one"} for row in pick_rows([(1.0, 0.0), (0.0, 1.0)])]
    first, second = open_pairs(rows)
    assert (first.prompt, first.chosen_prompt, first.rejected_prompt) == ("prompt 0", "zero", "one")
    assert (second.chosen_prompt, second.rejected_prompt) == ("one", "zero")
    assert color_of(second.chosen) == BLUE


def test_caption_lists_give_the_first_entry():
    rows = pick_rows([(1.0, 0.0)])
    assert open_pairs([rows[0] | {"caption": ["first", "second"]}])[0].prompt == "first"


def test_column_mapping():
    rows = [{"my_caption": "p", "good": picture(RED), "bad": picture(BLUE), "caption": "not this"}]
    pair = open_pairs(rows, columns={"prompt": "my_caption", "chosen": "good", "rejected": "bad"})[0]
    assert (pair.prompt, color_of(pair.chosen)) == ("p", RED)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"promt": "p", "chosen": b"", "rejected": b""}],
            None,
            r"no column for prompt.*mean 'promt'.*Columns found",
        ),
        ([{"prompt": "p", "chosen": b""}], None, r"no column for rejected \(rejected, .*columns: {rejected: prompt}"),
        (
            [{"prompt": "p", "jpg_0": b"", "jpg_1": b""}],
            None,
            r"no column for label_0.*found: prompt, jpg_0, jpg_1",
        ),
        (
            [{"prompt": "p"}],
            {"prompt": "promt"},
            r"no column 'promt' \(columns: prompt\). Did you mean 'prompt'",
        ),
        (
            [{"prompt": "p"}],
            {"promt": "prompt"},
            r"unknown field 'promt'. Did you mean 'prompt'\? Fields: prompt",
        ),
    ],
)
def test_missing_columns(rows, columns, message):
    with pytest.raises(UserError, match=message):
        open_pairs(rows, columns=columns)


@pytest.mark.parametrize("label", [1.2, -0.1, float("nan"), "yes"])
def test_label_that_is_no_probability(label):
    rows = [{"prompt": "p", "chosen": b"", "rejected": b""}] * 2
    with pytest.raises(UserError, match=r"row 1: label is .*outside \[0, 1\]"):
        open_pairs([rows[0] | {"label": 1.0}, rows[1] | {"label": label}])


def test_bad_rows_are_skipped_counted_and_listed_up_to_the_limit(caplog):
    rows = pick_rows([(1.0, 0.0)] * 20)
    for index in (3, 5, 8):
        rows[index]["caption"] = None
    pairs = open_pairs(rows)
    assert len(pairs) == 17
    assert [reason.split(":")[0].split()[-1] for reason in pairs.counts.bad] == ["3", "5", "8"]
    assert "3 bad rows skipped" in caplog.text
    with pytest.raises(UserError, match=r"(?s)3 bad rows, more than max_bad_rows = 2.*row 3: the prompt.*row 8"):
        open_pairs(rows, max_bad_rows=2)


def test_labels_that_contradict_each_other_are_a_bad_row():
    with pytest.raises(UserError, match="row 0: label_0 1 and label_1 1 do not add up to 1"):
        open_pairs(pick_rows([(1.0, 1.0)]), max_bad_rows=0)


def test_max_pairs():
    assert [pair.id for pair in open_pairs(pick_rows([(1.0, 0.0)] * 9), max_pairs=4)] == ["0", "1", "2", "3"]


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder"):
        open_pairs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no data there that is known \(found: nothing\). Known layouts: .*parquet"):
        open_pairs(tmp_path / "empty")
    (tmp_path / "pairs.csv").write_text("a")
    with pytest.raises(UserError, match=r"unknown kind of file '.csv'"):
        open_pairs(tmp_path / "pairs.csv")


def test_hub_id_that_cannot_be_loaded():
    with pytest.raises(UserError, match=r"'nobody/nothing' is neither a local .* split 'train'"):
        open_pairs("nobody/nothing")
