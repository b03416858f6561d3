from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data import write
from diffalign.data.images import EncodedImage
from diffalign.data.readers import open_pairs
from diffalign.data.write import PairRow, image_bytes, write_pairs
from diffalign.errors import UserError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int = 3) -> list[PairRow]:
    return [
        PairRow(f"prompt {i}", png(i), png(100 + i), 1.0 if i % 2 else 0.25, id=f"x{i}", margin=0.5 * i)
        for i in range(count)
    ]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    own = [*rows(), PairRow("both", png(7), png(8), 1.0, "left", "right", id="c", scores={"a": (1.0, 0.5)}, seed_0=3)]
    assert write_pairs(tmp_path / "train.parquet", own) == 4
    source = open_pairs(tmp_path)
    first, second, last = source[0], source[1], source[3]
    # A label below one half: the other image is the preferred one, by the other margin.
    assert (first.chosen.read(), first.label, first.margin) == (png(100), 0.75, 0.0)
    assert (second.chosen.read(), second.rejected.read(), second.label, second.margin) == (png(1), png(101), 1.0, 0.5)
    assert (last.chosen_prompt, last.rejected_prompt, last.id, last.margin) == ("left", "right", "c", None)
    table = pq.read_table(tmp_path / "train.parquet")
    assert json.loads(table["scores"][3].as_py()) == {"a": [1.0, 0.5]}
    assert "difficulty" not in table.column_names and table["seed_0"].to_pylist() == [None, None, None, 3]


def test_a_pair_that_was_read_becomes_the_same_row(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a" / "train.parquet", rows())
    write_pairs(tmp_path / "b" / "train.parquet", (PairRow.of(pair) for pair in open_pairs(tmp_path / "a")))
    before, after = open_pairs(tmp_path / "a"), open_pairs(tmp_path / "b")
    for one, other in zip(before, after, strict=True):
        assert (one.id, one.prompt, one.label, one.margin) == (other.id, other.prompt, other.label, other.margin)
        assert (one.chosen.read(), one.rejected.read()) == (other.chosen.read(), other.rejected.read())


def test_equal_rows_give_an_equal_file_however_many_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_pairs(tmp_path / f"{name}.parquet", rows(5))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    monkeypatch.setattr(write, "ROW_GROUP_BYTES", 1)
    write_pairs(tmp_path / "c.parquet", rows(5))
    assert pq.ParquetFile(tmp_path / "c.parquet").num_row_groups == 5
    assert pq.read_table(tmp_path / "c.parquet").equals(pq.read_table(tmp_path / "a.parquet"))


def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    with pytest.raises(UserError, match="no pair"):
        write_pairs(path, [])
    write_pairs(path, rows(1))
    kept = path.read_bytes()
    with pytest.raises(UserError, match="exists"):
        write_pairs(path, rows(2))

    def broken():
        yield rows(1)[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_pairs(path, broken(), overwrite=True)
    assert path.read_bytes() == kept and [file.name for file in tmp_path.iterdir()] == ["train.parquet"]
    with pytest.raises(ValueError, match="probability"):
        PairRow("a", b"", b"", 1.5)


def test_the_file_of_an_image(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 16), (1, 2, 3))
    picture.save(tmp_path / "a.jpg")
    assert image_bytes(EncodedImage.wrap(tmp_path / "a.jpg", "a")) == (tmp_path / "a.jpg").read_bytes()
    for value in (picture, EncodedImage.wrap(picture, "a")):
        assert Image.open(io.BytesIO(image_bytes(value))).getpixel((0, 0)) == (1, 2, 3)
