"""Prompts from files, lists and the shapes world."""

from __future__ import annotations

import pytest

from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import UserError
from diffalign.shapes.scene import is_heldout


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
