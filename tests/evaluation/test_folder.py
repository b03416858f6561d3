from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.folder import Case, SampleFolder, read_rows

SETTINGS = {"model": {"loras": [["ab", 1.0]], "pipeline": "cd"}, "num_inference_steps": 2, "scheduler": None}
CASES = [Case(index, f"prompt {index}", 7 + index) for index in range(4)]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def opened(path: Path, rank: int = 0) -> SampleFolder:
    folder = SampleFolder(path, SETTINGS, rank)
    folder.check(CASES)
    folder.prepare()
    folder.load()
    return folder


@pytest.fixture
def filled(tmp_path: Path) -> SampleFolder:
    folder = opened(tmp_path / "out")
    for case in CASES[:3]:
        folder.add(case, picture(case.index), {"flat": False})
    return folder


def test_images_and_rows(filled: SampleFolder) -> None:
    filled.finish()
    rows = read_rows(filled.path / "samples.jsonl")
    assert [row["file"] for row in rows] == [f"images/{i:05d}-{7 + i}.png" for i in range(3)]
    assert rows[1] == {"file": CASES[1].file, "prompt_index": 1, "prompt": "prompt 1", "seed": 8, "flat": False}
    assert np.array_equal(np.asarray(filled.image(CASES[2])), np.asarray(picture(2)))


def test_a_folder_goes_on_where_it_was(filled: SampleFolder) -> None:
    again = opened(filled.path)
    assert set(again.rows) == {case.file for case in CASES[:3]}


def test_what_a_killed_run_leaves_half_made_is_made_again(filled: SampleFolder) -> None:
    rows = filled.path / "samples.jsonl"
    rows.write_text(rows.read_text()[:-9])
    (filled.path / CASES[0].file).write_bytes((filled.path / CASES[0].file).read_bytes()[:40])
    (filled.path / "images/00009-0.0.tmp").write_bytes(b"half")
    again = opened(filled.path)
    assert set(again.rows) == {CASES[1].file}
    assert len(read_rows(rows)) == 1
    assert not list(filled.path.glob("images/*.tmp"))
    again.add(CASES[3], picture(3), {})
    assert len(read_rows(rows)) == 2


def test_an_image_that_is_gone_or_empty_is_made_again(filled: SampleFolder) -> None:
    (filled.path / CASES[0].file).unlink()
    (filled.path / CASES[1].file).write_bytes(b"")
    assert set(opened(filled.path).rows) == {CASES[2].file}


def test_processes_write_rows_of_their_own(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "out"), SampleFolder(tmp_path / "out", SETTINGS, rank=1)
    second.add(CASES[0], picture(0), {})
    first.add(CASES[1], picture(1), {})
    assert len(read_rows(tmp_path / "out/samples.jsonl")) == 1
    first.finish()
    assert [row["prompt_index"] for row in read_rows(tmp_path / "out/samples.jsonl")] == [0, 1]
    assert not list((tmp_path / "out").glob("samples.rank-*"))


def test_rows_of_a_killed_process_are_kept(tmp_path: Path) -> None:
    opened(tmp_path / "out")
    SampleFolder(tmp_path / "out", SETTINGS, rank=3).add(CASES[0], picture(0), {})
    assert set(opened(tmp_path / "out").rows) == {CASES[0].file}


def test_another_configuration_is_refused(filled: SampleFolder) -> None:
    other = {**SETTINGS, "num_inference_steps": 9, "model": {"loras": [["ab", 0.5]], "pipeline": "cd"}}
    folder = SampleFolder(filled.path, other)
    with pytest.raises(UserError) as caught:
        folder.check(CASES)
    assert "model (loras) has other weights or scales" in str(caught.value)
    assert "num_inference_steps is 2 there, 9 here" in str(caught.value)
    assert "scheduler" not in str(caught.value)
    assert "--overwrite_output_dir" in str(caught.value)


def test_other_prompts_are_refused_and_more_prompts_are_not(filled: SampleFolder) -> None:
    SampleFolder(filled.path, SETTINGS).check([*CASES, Case(4, "one more", 11)])
    with pytest.raises(UserError, match="drawn for the prompt 'prompt 1', not for 'another'"):
        SampleFolder(filled.path, SETTINGS).check([Case(1, "another", 8)])


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    photos = tmp_path / "out/images"
    photos.mkdir(parents=True)
    (photos / "cat.png").write_bytes(b"cat")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="something else"):
            SampleFolder(tmp_path / "out", SETTINGS).check([], overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="something else"):
        SampleFolder(tmp_path / "file", SETTINGS).check([])


def test_overwriting_removes_what_was_drawn_and_nothing_else(filled: SampleFolder) -> None:
    (filled.path / "notes.txt").write_text("mine")
    folder = SampleFolder(filled.path, {"other": True})
    folder.check(CASES, overwrite=True)
    folder.prepare(overwrite=True)
    folder.load()
    assert folder.rows == {} and not list(filled.path.glob("images/*"))
    assert json.loads((filled.path / "settings.json").read_text()) == {"other": True}
    assert (filled.path / "notes.txt").exists()


def test_a_broken_line_in_the_middle_is_named(filled: SampleFolder) -> None:
    rows = filled.path / "samples.jsonl"
    rows.write_text("{}\nno json\n{}\n")
    with pytest.raises(UserError, match=r"samples\.jsonl line 2"):
        read_rows(rows)
