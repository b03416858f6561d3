from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.config.files import parse_yaml
from diffalign.errors import UserError
from diffalign.rewards import Reward, RewardError, RewardOutput, load_rewards
from diffalign.rewards import registry as registry_module
from diffalign.rewards.combine import Member, RewardSet, RewardSpec
from diffalign.rewards.failures import FailurePolicy
from diffalign.rewards.score_cache import ScoreCache
from diffalign.rewards.transforms import ZScore
from diffalign.training.advantages import group_advantages

TABLE = {"first": [1.0, 2, 3], "second": [10.0, 0, 5]}


class Red(Reward):
    """Mean of a channel; differentiable."""

    name = "red"
    differentiable = True
    made = 0

    def __init__(self, channel: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.channel = channel
        self.calls = 0
        type(self).made += 1

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        self.calls += 1
        return images[:, self.channel].mean((1, 2))


class Listed(Reward):
    """Scores from the metadata: the test's own numbers."""

    uses_prompt = False

    def __init__(self, name: str = "first", **options: Any) -> None:
        super().__init__(**options)
        self.name = name

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> RewardOutput:
        scores = torch.tensor([row[self.name] for row in metadata])
        valid = scores.isfinite()
        return RewardOutput(scores, {}, valid, [None if ok else "not listed" for ok in valid])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_registered", {"red": Red, "listed": Listed})


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def listed(*members: Member, **options: Any) -> RewardSet:
    return RewardSet(members or [Member(name, Listed(name)) for name in TABLE], **options)


def rows(table: Mapping[str, list[float]] = TABLE) -> list[dict[str, float]]:
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def test_a_list_in_yaml() -> None:
    text = """
    - red
    - {reward: red, name: green, weight: 0.5, transform: {kind: affine, scale: 2}, options: {channel: 1}}
    - reward: red
      name: blue
      eval_only: yes
      options: {channel: 2, batch_size: 1}
    """.replace("yes", "true")
    rewards = load_rewards(parse_yaml(text, "x"), device="cpu")
    batch = images(3)
    means = batch.mean((2, 3))
    scores = rewards(batch, "x")
    assert rewards.names == ["red", "green", "blue"]
    assert torch.equal(scores.total, means[:, 0] + 0.5 * (2 * means[:, 1]))
    assert torch.equal(scores.raw["green"].rewards, means[:, 1])
    assert torch.equal(scores.transformed["green"], 2 * means[:, 1])
    assert torch.equal(scores.raw["blue"].rewards, means[:, 2])
    assert scores.valid.all() and scores.messages == [None] * 3
    assert rewards.members[2].reward.batch_size == 1


def test_equal_scorers_are_one_and_asked_once() -> None:
    made, pool = Red.made, {}  # type: ignore[var-annotated]
    train = load_rewards(["red", {"reward": "red", "name": "again", "transform": "zscore"}], device="cpu", pool=pool)
    judge = load_rewards(
        [{"reward": "red"}, {"reward": "red", "name": "g", "options": {"channel": 1}}], pool=pool, device="cpu"
    )
    assert Red.made - made == 2
    assert train.rewards == [judge.members[0].reward]
    train(images(2), "x")
    assert train.rewards[0].calls == 1  # type: ignore[attr-defined]


def test_sum_then_normalise_lets_the_widest_spread_win() -> None:
    """combining.md, section 1; normalising first is diffalign.training.advantages.combined_advantages."""
    scores = listed()(images(3), metadata=rows())
    assert scores.total.tolist() == [11, 2, 8]
    groups = torch.zeros(3, dtype=torch.int64)
    advantages = group_advantages(scores.total, groups, eps=0)
    assert advantages.tolist() == pytest.approx([1.069045, -1.336306, 0.267261], abs=1e-6)


def test_lsc_mode_centres_what_has_no_reference() -> None:
    rewards = load_rewards(
        [
            {"reward": "listed", "transform": {"kind": "lsc", "reference": 0.3}, "options": {"name": "a"}},
            {"reward": "listed", "transform": {"kind": "lsc", "reference": 0}, "options": {"name": "b"}},
        ],
        mode="lsc",
    )
    scores = rewards(images(3), metadata=rows({"a": [1, 0.2, 3], "b": [-0.5, 0.4, -2]}))
    assert scores.total.tolist() == pytest.approx([-1.377263, -1.257412, -2.191972], abs=1e-6)
    alone = load_rewards(["listed"], mode="lsc")
    total = alone(images(2), metadata=rows({"first": [1.0, 3.0]})).total
    assert total.tolist() == pytest.approx([math.log(1 / (1 + math.e)), math.log(1 / (1 + 1 / math.e))])


@pytest.mark.parametrize(("mode", "expected"), [("min", [0.8, -1, 1.4]), ("median", [1, 2, 1.5]), ("vote", [1, 4, 4])])
def test_modes(mode: Any, expected: list[float]) -> None:
    table = {"a": [1.0, 2, 1.5], "b": [1.2, 2.1, 1.4], "c": [0.8, -1, 1.6]}
    rewards = RewardSet([Member(name, Listed(name)) for name in table], mode=mode)
    scores = rewards(images(3), metadata=rows(table), group_ids=[0, 0, 0])
    assert scores.total.tolist() == pytest.approx(expected)


def test_a_dropped_image_has_no_total_and_says_why() -> None:
    table = {"first": [1.0, math.nan, 3], "second": [math.nan, 0, 5]}
    members = [Member("first", Listed("first")), Member("second", Listed("second"), eval_only=True)]
    rewards = RewardSet(members, policy=FailurePolicy("drop"))
    scores = rewards(images(3), metadata=rows(table))
    assert scores.total.isnan().tolist() == [False, True, False]
    assert scores.valid.tolist() == [True, False, True]
    assert scores.messages == [None, "first: not listed", None]
    assert scores.metrics()["reward/second/mean"] == 2.5
    assert rewards.ledger.metrics() == {"reward/first/failed": 1.0, "reward/second/failed": 1.0}
    with pytest.raises(RewardError, match="first failed on image 1"):
        listed()(images(3), metadata=rows(table))


def test_gradients_pass_through_the_total_only() -> None:
    rewards = load_rewards(
        [
            "red",
            {"reward": "red", "name": "z", "transform": "zscore", "weight": 2},
            {"reward": "listed", "eval_only": True},
        ]
    )
    batch = images(4).requires_grad_()
    scores = rewards(batch, "x", rows({"first": [0.0] * 4}), grad=True)
    assert not scores.transformed["first"].requires_grad
    scores.total.sum().backward()
    std = rewards.members[1].transforms[0].stats.std  # type: ignore[attr-defined]
    assert batch.grad is not None
    torch.testing.assert_close(batch.grad[:, 0], torch.full((4, 4, 4), (1 + 2 / std) / 16))
    with pytest.raises(TypeError, match="through first"):
        listed()(images(3), metadata=rows(), grad=True)
    with pytest.raises(TypeError, match="the mode vote"):
        RewardSet([Member("red", Red())], mode="vote")(batch, "x", group_ids=[0] * 4, grad=True)


def test_metrics_show_groups_without_spread() -> None:
    metrics = listed()(images(3), metadata=rows({"first": [1.0, 1, 4], "second": [1.0, 3, 7]})).metrics([5, 5, 6])
    assert metrics["reward/first/group_std"] == 0 and metrics["reward/first/flat_groups"] == 1
    assert metrics["reward/second/group_std"] == 1 and metrics["reward/second/flat_groups"] == 0
    assert metrics["reward/mean"] == pytest.approx(17 / 3)


def test_resumes_exactly() -> None:
    def fresh() -> RewardSet:
        return listed(Member("first", Listed("first"), 1.0, [ZScore()]), Member("second", Listed("second")))

    whole, first, second = fresh(), fresh(), fresh()
    batches = [rows({"first": [n * 1.3, 2, math.pi], "second": [n, 1 / 3, 4.0]}) for n in (0.0, 1.0, 2.0)]
    for rewards in (whole, first):
        for batch in batches[:2]:
            rewards(images(3), metadata=batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(second(images(3), metadata=batches[2]).total, whole(images(3), metadata=batches[2]).total)
    assert second.correlations() == whole.correlations()
    assert list(whole.correlations()) == ["first ~ second"] and whole.correlations()["first ~ second"]["count"] == 9
    before = second.state_dict()
    second(images(3), metadata=batches[0], update=False)
    assert (
        second.state_dict()["transforms"] == before["transforms"] and second.state_dict()["recent"] == before["recent"]
    )


def test_a_state_of_other_rewards_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    state = listed().state_dict()
    with pytest.raises(UserError, match=r"first had the transforms \[\] and now has \['zscore'\]"):
        listed(Member("first", Listed(), 1.0, [ZScore()])).load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        listed(Member("third", Listed())).load_state_dict(state)
    assert "third was not there before" in caplog.text


def test_a_file_beside_the_config_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    rewards = load_rewards(["mine.py:bright"], folder=tmp_path)
    assert rewards.names == ["bright"]
    batch = images(2)
    torch.testing.assert_close(rewards(batch, "x").total, batch.mean((1, 2, 3)))
    monkeypatch.chdir(tmp_path)
    assert load_rewards(["./mine.py:bright"], folder="elsewhere").names == ["bright"]


def test_scores_are_cached_across_sets(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    for misses in (3, 3):
        rewards = load_rewards(
            ["red", {"reward": "red", "name": "z", "transform": "zscore"}], cache=cache, device="cpu"
        )
        scores = rewards(images(3), "x")
        assert cache.misses["red"] == misses
        assert torch.equal(scores.raw["red"].rewards, images(3)[:, 0].mean((1, 2)))
    assert cache.hits["red"] == 3


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([{"reward": "red", "wieght": 2}], {}, "mine.yaml[0]: unknown key 'wieght'. Did you mean 'weight'?"),
        (["red", {"weight": 2}], {}, "mine.yaml[1]: the mapping {'weight': 2} does not say which reward"),
        ([3], {}, "a reward is a name or a mapping with reward:, got 3"),
        (["redd"], {}, "no reward 'redd'. Did you mean 'red'?"),
        (["red", "red"], {}, "two rewards are named 'red'"),
        ([], {}, "the list is empty"),
        ([{"reward": "red", "eval_only": True}], {}, "all are eval_only"),
        (["red"], {"mode": "mediann"}, "no mode 'mediann'. Did you mean 'median'?"),
        ([{"reward": "red", "weight": 2}], {"mode": "min"}, "has no meaning in the mode min"),
        ([{"reward": "red", "weight": -1}], {"mode": "mean"}, "must be above 0 in the mode mean"),
        ([{"reward": "red", "weight": math.nan}], {}, "mine.yaml[0]: weight: expected a number, got nan"),
        ([{"reward": "red", "options": {"chanel": 1}}], {}, "no option 'chanel'. Did you mean 'channel'?"),
        ([{"reward": "red", "transform": "zscor"}], {}, "mine.yaml[0]: there is no transform 'zscor'"),
    ],
)
def test_wrong_lists(rewards: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError) as info:
        load_rewards(rewards, where="mine.yaml", **options)
    assert message in str(info.value)


def test_vote_needs_groups_and_no_images_are_no_scores() -> None:
    with pytest.raises(UserError, match="give group_ids"):
        RewardSet([Member("red", Red())], mode="vote")(images(2), "x")
    scores = load_rewards(["red", {"reward": "red", "name": "z", "transform": "zscore"}])(images(0), [])
    assert scores.total.shape == scores.valid.shape == (0,) and scores.metrics() == {}
    assert RewardSpec.of(RewardSpec("red")).reward == "red"
    with pytest.raises(UserError, match="the weight of red is nan"):
        RewardSet([Member("red", Red(), math.nan)])
