from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.data.readers import open_pairs
from diffalign.evaluation.stats import wilson
from diffalign.labelling.items import Item, find_items
from diffalign.labelling.results import judge, write_votes


@pytest.fixture
def items(two_models: list[str]) -> list[Item]:
    scores = [(0.1, 0.9), (0.9, 0.1), (0.2, 0.8), (0.5, 0.5), (0.0, 1.0)]
    found = find_items(two_models)
    return [
        Item(i.id, i.prompt, i.images, i.models, i.seeds, {"good": s, "bad": (s[1], s[0])}, None)
        for i, s in zip(found, scores, strict=True)
    ]


def test_majorities_win_and_rewards_agree(items: list[Item]) -> None:
    ids = [item.id for item in items]
    one = dict(zip(ids, ["second", "first", "second", "tie", "skip"], strict=True))
    two = {ids[0]: "second", ids[1]: "second", "not shown": "first"}
    results = judge(items, {"annotator-1": one, "annotator-2": two})
    # Two for the second, one split, one tie; nobody judged the last.
    ((model, other, rate),) = results.win_rates
    assert (model, other) == ("mine", "base")
    assert (rate.wins, rate.ties, rate.losses, rate.rate) == (2, 2, 0, 0.75)
    assert (rate.low, rate.high) == wilson(2, 4, ties=2)
    assert results.agreement["good"].rate == 1 and results.agreement["good"].n == 2
    assert results.agreement["bad"].rate == 0
    assert results.between == [("annotator-1", "annotator-2", 0.5, 2)]
    assert results.counts["annotator-1"] == {"first": 1, "tie": 1, "second": 2, "skip": 1}
    assert results.counts["annotator-2"] == {"first": 0, "tie": 0, "second": 2, "skip": 0}
    own = {who: (m, o, rate.wins, rate.ties, rate.losses) for who, m, o, rate in results.by_annotator}
    assert own == {"annotator-1": ("mine", "base", 2, 1, 1), "annotator-2": ("mine", "base", 2, 0, 0)}
    assert judge(items, {"annotator-1": one}).by_annotator == []
    text = "\n".join(results.lines())
    assert "annotator-2 prefers mine to base: win rate 1.00" in text
    assert results.plain()["by_annotator"][1]["annotator"] == "annotator-2"
    assert "people prefer mine to base: win rate 0.75" in text and "good agrees with people: 1.000" in text
    assert results.plain()["win_rates"][0]["against"] == "base"


def test_votes_become_pairs_that_training_reads(items: list[Item], tmp_path: Path) -> None:
    ids = [item.id for item in items]
    votes = {"annotator-1": {ids[0]: "second", ids[1]: "tie", ids[2]: "skip"}, "annotator-2": {ids[0]: "first"}}
    assert write_votes(tmp_path / "votes" / "train.parquet", items, votes) == 3
    pairs = list(open_pairs(tmp_path / "votes", ties="keep"))
    assert [(p.prompt, p.label, p.user_id) for p in pairs] == [
        (items[0].prompt, 1.0, "annotator-1"),
        (items[0].prompt, 1.0, "annotator-2"),
        (items[1].prompt, 0.5, "annotator-1"),
    ]
    assert pairs[0].chosen.read() == items[0].images[1].read() == pairs[1].rejected.read()
    assert len({p.id for p in pairs}) == 3
    assert len(open_pairs(tmp_path / "votes")) == 2, "ties are dropped by default"
    assert write_votes(tmp_path / "none" / "train.parquet", items, {"annotator-1": {ids[2]: "skip"}}) == 0
    assert not (tmp_path / "none").exists()


def test_no_votes_say_nothing(items: list[Item]) -> None:
    results = judge(items, {})
    assert list(results.lines()) == [] and results.win_rates == [] and results.agreement == {}
