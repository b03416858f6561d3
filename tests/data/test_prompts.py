"""Prompts from files, lists and the shapes world."""

from __future__ import annotations

import pytest

from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import UserError
from diffalign.evaluation.shapes import heldout_prompts
from diffalign.shapes.scene import is_heldout, meaning


def test_text_file(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("a cat"), Prompt("a dog")]
    assert read_prompts(str(tmp_path / "p.txt"), limit=1) == [Prompt("a cat")]


def test_jsonl_keeps_metadata(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "two cats", "count": 2}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("two cats", {"count": 2})]


def test_list_and_heldout():
    assert read_prompts(["a", ""]) == [Prompt("a"), Prompt("")]
    captions = [prompt.text for prompt in read_prompts("shapes-heldout", limit=20, seed=1)]
    assert len(set(captions)) == 20
    assert all(is_heldout(caption) for caption in captions)
    assert captions == [prompt.text for prompt in read_prompts("shapes-heldout", limit=20, seed=1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"promt": "b"}', r"p.jsonl line 2: no prompt"),
        ('{"prompt": "a"}\n{', r"p.jsonl line 2: not valid JSON"),
        ("", r"no prompts there"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_missing_file_and_zero_prompts(tmp_path):
    with pytest.raises(UserError, match=r"no such prompt file.*shapes-heldout"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(UserError, match="at least one"):
        read_prompts(["a"], limit=0)


def parquet(path, **columns):
    import datasets

    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return path


def test_a_column_of_a_table_with_the_others_as_metadata(tmp_path):
    path = parquet(tmp_path / "p.parquet", caption=["a cat", "two dogs"], count=[1, 2], bytes=[b"x", b"y"])
    wanted = [Prompt("a cat", {"count": 1}), Prompt("two dogs", {"count": 2})]
    assert read_prompts(path) == wanted
    assert read_prompts(f"{path}:caption") == wanted
    assert read_prompts(f"{tmp_path}:caption", limit=1) == wanted[:1]
    with pytest.raises(UserError, match=r"no column 'captoin'. Did you mean 'caption'"):
        read_prompts(f"{path}:captoin")
    with pytest.raises(UserError, match=r"p.parquet row 0: count is 1, not a prompt"):
        read_prompts(f"{path}:count")
    other = parquet(tmp_path / "other.parquet", words=["a"])
    with pytest.raises(UserError, match=r"no column any of prompt, caption, text.*other.parquet:words"):
        read_prompts(other)


def test_a_column_of_a_hub_data_set(monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"prompt": ["a"], "text": ["b"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_prompts("hub:owner/name:text") == [Prompt("b", {"prompt": "a"})]
    assert read_prompts("hub:owner/name@test") == [Prompt("a", {"text": "b"})]
    assert asked == [("owner/name", "train"), ("owner/name", "test")]


FUNCTIONS = """
import itertools

def pairs():
    return ["a cat", ("two dogs", {"count": 2})]

def endless():
    return (f"prompt {i}" for i in itertools.count())

def wrong():
    return ["a", 3]

def single():
    return "a cat"
"""


def test_functions(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    assert read_prompts(f"{file}:pairs") == [Prompt("a cat"), Prompt("two dogs", {"count": 2})]
    assert [p.text for p in read_prompts(f"{file}:endless", limit=2)] == ["prompt 0", "prompt 1"]
    with pytest.raises(UserError, match=r"wrong: item 1 is 3"):
        read_prompts(f"{file}:wrong")
    with pytest.raises(UserError, match="returned a str"):
        read_prompts(f"{file}:single")
    with pytest.raises(UserError, match="Did you mean 'pairs'"):
        read_prompts(f"{file}:pair")
    with pytest.raises(UserError, match="no module 'nowhere'"):
        read_prompts("nowhere:prompts")


def test_the_training_split_of_the_shapes_world_is_apart_from_the_held_out_one():
    captions = [prompt.text for prompt in read_prompts("shapes-train")]
    assert len(set(captions)) == 1024
    assert not any(is_heldout(caption) for caption in captions)


def test_captions_to_choose_by_say_nothing_that_results_are_reported_on():
    reported = set(heldout_prompts(1024))
    captions = [prompt.text for prompt in read_prompts("shapes-validation", limit=100)]
    assert len(set(captions)) == 100 and all(map(is_heldout, captions))
    assert not set(map(meaning, reported)) & set(map(meaning, captions))
    assert reported & {prompt.text for prompt in read_prompts("shapes-heldout")}
