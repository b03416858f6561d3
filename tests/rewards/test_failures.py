from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import Reward, RewardError, RewardOutput, failures
from diffalign.rewards.failures import FailureLedger, FailurePolicy, guarded

DROP = FailurePolicy("drop")


class Picky(Reward):
    """Scores an image by its first pixel; ``trouble`` is asked what to do with each batch of prompts first."""

    name = "picky"
    version = "1"

    def __init__(self, trouble: Callable[[list[str]], Any], **options: Any) -> None:
        super().__init__(**options)
        self.trouble = trouble
        self.calls: list[list[str]] = []

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Any:
        self.calls.append(prompts)
        given = self.trouble(prompts)
        scores = images[:, 0, 0, 0] if given is None else given
        return scores if isinstance(scores, RewardOutput) else (scores, {"twice": 2 * scores})


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", waited.append)
    return waited


def images(count: int) -> Tensor:
    return (torch.arange(count) / 200).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def prompts(count: int, *bad: int) -> list[str]:
    return ["bad" if index in bad else f"p{index}" for index in range(count)]


def explode(texts: list[str]) -> None:
    if "bad" in texts:
        raise ZeroDivisionError("no such luck")


def infinite(texts: list[str]) -> Tensor | None:
    return torch.tensor([math.inf if text == "bad" else 1.0 for text in texts]) if "bad" in texts else None


def short(texts: list[str]) -> Tensor | None:
    return torch.zeros(len(texts) + 1) if "bad" in texts else None


def elsewhere(texts: list[str]) -> Tensor | None:
    return torch.zeros(len(texts), device="meta") if "bad" in texts else None


def marked(texts: list[str]) -> RewardOutput | None:
    good = torch.tensor([text != "bad" for text in texts])
    zeros = torch.zeros(len(texts))
    return RewardOutput(zeros, {"twice": zeros}, good, ["it is bad" if text == "bad" else None for text in texts])


TROUBLES = [
    (explode, "ZeroDivisionError: no such luck"),
    (infinite, "as inf"),
    (short, r"scores of shape"),
    (elsewhere, "runs on cpu but returned scores on meta"),
    (marked, "it is bad"),
]


@pytest.mark.parametrize(("trouble", "message"), TROUBLES)
def test_stop_names_reward_image_and_prompt(trouble: Any, message: str) -> None:
    ledger = FailureLedger()
    with pytest.raises(RewardError, match=rf"reward picky failed on image 4 \(prompt 'bad'\): .*{message}"):
        guarded(Picky(trouble, batch_size=1), images(6), prompts(6, 4), ledger=ledger)
    assert not ledger.metrics()


def test_stop_names_the_batch_where_the_image_is_not_known() -> None:
    with pytest.raises(RewardError, match=r"one of images 4 to 7, the first of them \(prompt 'p4'\): ZeroDiv") as info:
        guarded(Picky(explode, batch_size=4), images(10), prompts(10, 6))
    assert isinstance(info.value.__cause__, ZeroDivisionError)
    assert "on_failure: retry tries again" in str(info.value)


@pytest.mark.parametrize(("trouble", "message"), TROUBLES)
def test_drop_marks_only_the_bad_images_and_counts_them(
    trouble: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, reward = FailureLedger(), Picky(trouble, batch_size=4)
    with caplog.at_level(logging.WARNING):
        output = guarded(reward, images(40), prompts(40, 6, 21), policy=DROP, ledger=ledger)
    assert (~output.valid).nonzero().flatten().tolist() == [6, 21]
    assert output.rewards.isnan().nonzero().flatten().tolist() == [6, 21]
    assert message.split("as ")[-1].split("scores of")[-1] in str(output.messages[6])
    assert ledger.failed["picky"] == 2 and ledger.seen["picky"] == 40
    assert ledger.metrics() == {"reward/picky/failed": 2.0}
    assert "2 of 40 images could not be scored and are left out (2 of 40 so far)" in caplog.text
    if trouble is explode:
        good = output.valid
        assert torch.equal(output.rewards[good], images(40)[good, 0, 0, 0])
        assert torch.equal(output.details["twice"][good], 2 * output.rewards[good])
        assert output.details["twice"].isnan().nonzero().flatten().tolist() == [6, 21]


def test_retry_tries_again_what_failed_with_growing_waits(waits: list[float]) -> None:
    fails = iter([True, True, False])

    def flaky(texts: list[str]) -> RewardOutput | None:
        return marked(texts) if "bad" in texts and next(fails) else None

    ledger, reward = FailureLedger(), Picky(flaky)
    policy = FailurePolicy("retry", retries=3, backoff_seconds=0.5)
    output = guarded(reward, images(5), prompts(5, 2), policy=policy, ledger=ledger)
    assert output.valid.all()
    assert output.rewards[2].item() == pytest.approx(2 / 200)
    assert reward.calls == [prompts(5, 2), ["bad"], ["bad"]]
    assert waits == [0.5, 1.0]
    assert ledger.retried["picky"] == 2 and ledger.failed["picky"] == 0


def test_retry_stops_in_the_end(waits: list[float]) -> None:
    reward = Picky(explode)
    with pytest.raises(RewardError, match="failed 4 times on image 0"):
        guarded(reward, images(1), prompts(1, 0), policy=FailurePolicy("retry"))
    assert len(reward.calls) == 4 and waits == [1.0, 2.0, 4.0]


def test_a_call_that_is_wrong_is_no_failure_to_retry_or_drop(waits: list[float]) -> None:
    for on_failure in failures.ON_FAILURE:
        reward = Picky(lambda texts: None)
        with pytest.raises(UserError, match="convert by images"):
            guarded(reward, images(3) - 1, "x", policy=FailurePolicy(on_failure))  # type: ignore[arg-type]
        with pytest.raises(UserError, match="3 images but 2 prompts"):
            guarded(reward, images(3), ["a", "b"], policy=FailurePolicy(on_failure))  # type: ignore[arg-type]
    assert not waits and not reward.calls


def test_drop_ends_when_too_many_failed() -> None:
    ledger, policy = FailureLedger(), FailurePolicy("drop", max_failed_share=0.05)
    reward = Picky(marked)
    guarded(reward, images(5), ["bad"] * 5, policy=policy, ledger=ledger)  # 5 of a hundred at least
    with pytest.raises(RewardError, match=r"could not score 6 of 6 images, more than the share of 0.05 .*it is bad"):
        guarded(reward, images(1), ["bad"], policy=policy, ledger=ledger)


def test_a_scorer_that_died_after_a_long_run_is_noticed() -> None:
    ledger, reward = FailureLedger(), Picky(explode)
    ledger.seen["picky"] = 100_000
    with pytest.raises(RewardError, match="the last 20 of them one after another: ZeroDivisionError"):
        guarded(reward, images(64), ["bad"] * 64, policy=DROP, ledger=ledger)
    assert len(reward.calls) < 50


def test_groups_are_dropped_and_tried_again_as_a_whole() -> None:
    class Grouped(Picky):
        mode = "groupwise"

        def score(self, images: Any, prompts: Any, metadata: Any, *, group_ids: list[int]) -> Any:  # type: ignore[override]
            assert sorted(group_ids) == sorted(g for g in set(group_ids) for _ in range(3)), "a group was divided"
            return super().score(images, prompts, metadata)

    ids = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    output = guarded(Grouped(explode), images(9), prompts(9, 4), group_ids=ids, policy=DROP)
    assert (~output.valid).nonzero().flatten().tolist() == [1, 4, 7]
    fails = iter([True, False])
    reward = Grouped(lambda texts: marked(texts) if next(fails) else None)
    output = guarded(reward, images(9), prompts(9, 4), group_ids=ids, policy=FailurePolicy("retry"))
    assert output.valid.all() and reward.calls[1] == ["p1", "bad", "p7"]
    assert output.rewards[1].item() == pytest.approx(1 / 200)


def test_no_images_and_gradients() -> None:
    reward = Picky(explode)
    assert guarded(reward, images(0), [], policy=DROP).rewards.shape == (0,)
    reward.differentiable = True
    batch = images(6).clone().requires_grad_()
    output = guarded(reward, batch, prompts(6, 3), policy=DROP, grad=True)
    output.rewards[output.valid].sum().backward()
    assert batch.grad is not None and batch.grad[:, 0, 0, 0].tolist() == [1, 1, 1, 0, 1, 1]


def test_the_ledger_goes_on_where_it_was() -> None:
    ledger = FailureLedger()
    guarded(Picky(marked), images(8), prompts(8, 1), policy=DROP, ledger=ledger)
    again = FailureLedger()
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again.state_dict() == ledger.state_dict()
    assert again.messages["picky"]["it is bad"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "dorp"}, "Did you mean 'drop'"),
        ({"retries": -1}, "must not be negative"),
        ({"max_failed_share": 5}, "from 0 to 1"),
    ],
)
def test_wrong_policies(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FailurePolicy(**options)
