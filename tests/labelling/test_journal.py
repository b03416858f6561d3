from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.labelling.journal import Journal


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text(encoding="utf-8").splitlines()]


def test_votes_are_on_disk_when_add_returns_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (real(number), synced.append(len(rows(tmp_path)))))
    journal = Journal(tmp_path)
    journal.add("annotator-1", "x", "first", left="second")
    journal.add("annotator-1", "y", "tie")
    journal.add("annotator-2", "x", "skip")
    assert synced == [1, 2, 3]
    assert rows(tmp_path)[0] | {"time": ""} == {
        "time": "",
        "annotator": "annotator-1",
        "item": "x",
        "vote": "first",
        "left": "second",
    }
    journal.close()
    again = Journal(tmp_path)
    assert again.votes == {"annotator-1": {"x": "first", "y": "tie"}, "annotator-2": {"x": "skip"}}
    again.close()


def test_a_vote_repeated_is_one_and_a_vote_changed_is_the_latest(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for item, vote in (("x", "first"), ("x", "first"), ("y", "tie"), ("x", "second"), ("z", "undo"), ("y", "undo")):
        journal.add("annotator-1", item, vote)
    assert [row["vote"] for row in rows(tmp_path)] == ["first", "tie", "second", "undo"]
    assert journal.votes == {"annotator-1": {"x": "second"}}
    journal.close()


def test_a_line_that_was_cut_off_goes_and_the_next_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add("annotator-1", "x", "first")
    journal.close()
    with (tmp_path / "votes.jsonl").open("a") as stream:
        stream.write('{"annotator": "annotator-1", "item": "y", "vo')
    again = Journal(tmp_path)
    again.add("annotator-1", "z", "tie")
    again.close()
    assert [(row["item"], row["vote"]) for row in rows(tmp_path)] == [("x", "first"), ("z", "tie")]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.add("annotator-1", "x", "first")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.add("annotator-1", "y", "tie")
    assert journal.votes == {"annotator-1": {"x": "first"}} and len(rows(tmp_path)) == 1
    journal.add("annotator-1", "y", "tie")
    assert len(rows(tmp_path)) == 2
    journal.close()


def test_one_process_at_a_time_and_only_votes(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(UserError, match="in use"):
        Journal(tmp_path)
    journal.close()
    (tmp_path / "votes.jsonl").write_text('{"annotator": "a", "item": "x", "vote": "third"}\n')
    with pytest.raises(UserError, match="line 1 is no vote"):
        Journal(tmp_path)
