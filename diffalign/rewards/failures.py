"""What happens when an image cannot be scored: stop, try again, or leave it out. Never a silent 0.

    output = guarded(reward, images, prompts, metadata, policy=FailurePolicy("drop"), ledger=ledger)

A failure is an exception of the reward, a score that is not finite, scores of another number or on another device, and
a row that the reward itself marks as not valid. A :class:`UserError` (images out of range, prompts missing) is none:
it is about the call, would come back each time, and is raised whatever the policy.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.base import GroupIds, Images, Metadata, Reward
from diffalign.rewards.inputs import as_group_ids, as_prompts, as_rows, device_of, subset
from diffalign.rewards.output import RewardError, RewardOutput, merge

logger = logging.getLogger(__name__)

ON_FAILURE = ("stop", "retry", "drop")
_AT_LEAST = 100
"""Images that a share of failures is taken of at least: one bad image in the first batch of eight is no epidemic."""
_IN_A_ROW = 20
"""Images that may raise one after another before it is the scorer that is broken, however long the run has been."""
_DISTINCT = 100
"""Messages that are counted apart."""


@dataclass(frozen=True)
class FailurePolicy:
    """What to do with images that cannot be scored.

    Attributes:
        on_failure: "stop" raises, so that the run ends and can be resumed; "retry" tries again and then raises; "drop"
            marks the image as not valid, and the caller leaves it out.
        retries: how often "retry" tries again.
        backoff_seconds: the wait before the first new attempt; doubles with each.
        max_failed_share: "drop" raises once more than this share of all images so far (of 100 at least) has failed,
            or 20 images one after another have raised.
    """

    on_failure: Literal["stop", "retry", "drop"] = "stop"
    retries: int = 3
    backoff_seconds: float = 1.0
    max_failed_share: float = 0.05

    def __post_init__(self) -> None:
        if self.on_failure not in ON_FAILURE:
            raise UserError(
                f"on_failure is {self.on_failure!r}.{did_you_mean(str(self.on_failure), ON_FAILURE)} "
                f"Choose one of {', '.join(ON_FAILURE)}."
            )
        if self.retries < 0 or self.backoff_seconds < 0 or not 0 <= self.max_failed_share <= 1:
            raise UserError(
                "retries and backoff_seconds must not be negative and max_failed_share must be from 0 to 1; got "
                f"{self.retries}, {self.backoff_seconds} and {self.max_failed_share}"
            )


@dataclass
class FailureLedger:
    """How many images each reward was given and could not score, and why; kept for a run and resumed with it.

    Attributes:
        seen, failed, retried: numbers of images (of attempts for ``retried``) by the reward's name.
        messages: numbers of failed images by the reward's name and message.
        in_a_row: images that raised since the reward last returned anything.
    """

    seen: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)
    messages: dict[str, Counter[str]] = field(default_factory=dict)
    in_a_row: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, output: RewardOutput) -> None:
        """Count what a reward returned; logs what failed."""
        reasons = [message or "" for message, ok in zip(output.messages, output.valid.tolist(), strict=True) if not ok]
        self.seen[name] += len(output.rewards)
        self.failed[name] += len(reasons)
        counts = self.messages.setdefault(name, Counter())
        for reason in reasons:
            counts[reason if reason in counts or len(counts) < _DISTINCT else "other"] += 1
        if reasons:
            logger.warning(
                "%s: %d of %d images could not be scored and are left out (%d of %d so far): %s",
                name,
                len(reasons),
                len(output.rewards),
                self.failed[name],
                self.seen[name],
                reasons[0],
            )

    def check(self, name: str, policy: FailurePolicy, pending: int = 0, reason: str = "") -> None:
        """Raise a RewardError if more images failed than the policy bears.

        Args:
            pending: images of a call still going on that have failed already and are not counted yet.
            reason: of the last failure.
        """
        failed, seen = self.failed[name] + pending, self.seen[name] + pending
        too_many = failed > policy.max_failed_share * max(seen, _AT_LEAST)
        if not too_many and self.in_a_row[name] < _IN_A_ROW:
            return
        why = (
            f"more than the share of {policy.max_failed_share:g} that max_failed_share allows"
            if too_many
            else f"the last {self.in_a_row[name]} of them one after another"
        )
        known = [text for text, _ in self.messages.get(name, Counter()).most_common(3)]
        reasons = "; ".join(dict.fromkeys([*([reason] if reason else []), *known]))
        raise RewardError(f"the reward {name} could not score {failed} of {seen} images, {why}: {reasons}")

    def metrics(self) -> dict[str, float]:
        """Numbers to log, by "reward/NAME/failed" and "reward/NAME/retried"; none of rewards that never failed."""
        return {
            f"reward/{name}/{key}": float(count)
            for key, counts in (("failed", self.failed), ("retried", self.retried))
            for name, count in counts.items()
            if count
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {"seen": self.seen, "failed": self.failed, "retried": self.retried}
        return {
            **{key: dict(counts) for key, counts in parts.items()},
            "messages": {name: dict(counts) for name, counts in self.messages.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.seen, self.failed, self.retried = (Counter(state[key]) for key in ("seen", "failed", "retried"))
        self.messages = {name: Counter(counts) for name, counts in state["messages"].items()}


def guarded(
    reward: Reward,
    images: Images,
    prompts: Sequence[str] | str | None = None,
    metadata: Metadata | None = None,
    *,
    group_ids: GroupIds | None = None,
    policy: FailurePolicy | None = None,
    ledger: FailureLedger | None = None,
    grad: bool = False,
    names: Sequence[str] | None = None,
) -> RewardOutput:
    """Score images under a policy for failures. Arguments as of :meth:`diffalign.rewards.base.Reward.__call__`.

    Args:
        policy: stop by default.
        ledger: where failures are counted; needed for a share of failures over a whole run.
        names: how errors call the images, such as their files; by default they are numbered.

    Returns:
        N scores; under "drop" NaN, ``valid`` False and a message where there is none, otherwise all valid.

    Raises:
        RewardError: an image could not be scored (stop, retry), or too many could not (drop); says which image.
        UserError: the call itself is wrong.
    """
    policy, ledger = policy or FailurePolicy(), FailureLedger() if ledger is None else ledger
    count, name = len(images), reward.name
    texts = as_prompts(prompts, count, name, needed=reward.uses_prompt)
    rows = as_rows(metadata, count, name, reward.required_metadata)
    groups = as_group_ids(group_ids, count, name, needed=reward.mode == "groupwise")
    if not count:
        return reward(images, texts, rows, group_ids=groups, grad=grad)
    called = [str(number) for number in range(count)] if names is None else names
    call = _Call(reward, images, texts, rows, groups, grad, policy, ledger, called)
    output = call.isolate(list(range(count))) if policy.on_failure == "drop" else call.insist()
    ledger.add(name, output)
    if not output.valid.all():
        ledger.check(name, policy)
    return output


@dataclass
class _Call:
    """A call of a reward that can be made again, whole or in part."""

    reward: Reward
    images: Images
    texts: list[str]
    rows: list[Mapping[str, Any]]
    groups: list[int] | None
    grad: bool
    policy: FailurePolicy
    ledger: FailureLedger
    names: Sequence[str]
    raised: int = 0

    def score(self, indices: list[int]) -> RewardOutput:
        """Score some of the images, given in rising order."""
        whole = len(indices) == len(self.texts)
        output = self.reward(
            self.images if whole else subset(self.images, indices),
            [self.texts[i] for i in indices],
            [self.rows[i] for i in indices],
            group_ids=None if self.groups is None else [self.groups[i] for i in indices],
            grad=self.grad,
        )
        self.ledger.in_a_row[self.reward.name] = 0
        return output

    def units(self, indices: list[int]) -> list[list[int]]:
        """What can be scored apart from the rest: each image, or each group for a groupwise reward."""
        units: dict[int, list[int]] = {}
        for index in indices:
            apart = self.groups is None or self.reward.mode == "pointwise"
            units.setdefault(index if apart else self.groups[index], []).append(index)  # type: ignore[index]
        return list(units.values())

    def insist(self) -> RewardOutput:
        """Scores of all images; where the policy says so, what failed is tried again, and only that."""
        left, parts, order = list(range(len(self.texts))), [], []
        for attempt in range(self.policy.retries + 1):
            cause: Exception | None = None
            try:
                output = self.score(left)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - a reward is anyone's code; raised again below, or retried
                cause, problem = error, f"{self.where([left[i] for i in self.reward.scoring])}: {_text(error)}"
            else:
                valid = dict(zip(left, output.valid.tolist(), strict=True))
                done = [index for unit in self.units(left) if all(valid[i] for i in unit) for index in unit]
                if done:
                    parts.append(_rows(output, [left.index(index) for index in done]))
                    order += done
                if len(done) == len(left):
                    return merge(parts, order, device_of(self.images), self.reward.name)
                bad = output.valid.tolist().index(False)
                problem = f"{self.where([left[bad]])}: {output.messages[bad]}"
                left = [index for index in left if index not in done]
            self.wait_or_raise(attempt, problem, cause)
        raise AssertionError("the last attempt returns or raises")

    def wait_or_raise(self, attempt: int, problem: str, cause: Exception | None) -> None:
        """After a failure: wait before the next attempt, or raise if there is none."""
        name, policy = self.reward.name, self.policy
        if policy.on_failure == "stop" or attempt == policy.retries:
            tried = f" {attempt + 1} times" if attempt else ""
            raise RewardError(
                f"the reward {name} failed{tried} on {problem}. Nothing was made up in its place. on_failure: retry "
                "tries again; drop leaves such images out and counts them."
            ) from cause
        wait = policy.backoff_seconds * 2**attempt
        self.ledger.retried[name] += 1
        logger.warning(
            "%s failed on %s; trying again in %g s (%d of %d)", name, problem, wait, attempt + 1, policy.retries
        )
        time.sleep(wait)

    def isolate(self, indices: list[int]) -> RewardOutput:
        """Scores of the images, none for those that raise: these are found by halving what raised."""
        try:
            return self.score(indices)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a reward is anyone's code; kept as the image's message
            units, reason = self.units(indices), _text(error)
            if len(units) > 1:
                halves = units[: len(units) // 2], units[len(units) // 2 :]
            else:
                self.raised += len(indices)
                self.ledger.in_a_row[self.reward.name] += len(indices)
                self.ledger.check(self.reward.name, self.policy, self.raised, reason)
                return self.nothing(len(indices), reason)
        order = [sorted(index for unit in half for index in unit) for half in halves]
        parts = _equal_details([self.isolate(half) for half in order])
        return merge(parts, order[0] + order[1], device_of(self.images), self.reward.name)

    def nothing(self, count: int, reason: str) -> RewardOutput:
        device = device_of(self.images)
        missing = torch.zeros(count, dtype=torch.bool, device=device)
        return RewardOutput(torch.full((count,), math.nan, device=device), {}, missing, [reason] * count)

    def where(self, indices: list[int]) -> str:
        """The images, and the prompts of the first, as errors name them."""
        first, last = indices[0], indices[-1]
        prompt = f" (prompt {self.texts[first]!r:.120})" if self.reward.uses_prompt else ""
        if first == last:
            return f"image {self.names[first]}{prompt}"
        return f"one of images {self.names[first]} to {self.names[last]}, the first of them{prompt}"


def _text(error: Exception) -> str:
    """What an image is dropped for; a reward's own errors name a batch's image, which means nothing later."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _rows(output: RewardOutput, places: list[int]) -> RewardOutput:
    return RewardOutput(
        output.rewards[places],
        {key: value[places] for key, value in output.details.items()},
        output.valid[places],
        [output.messages[place] for place in places],
    )


def _equal_details(parts: list[RewardOutput]) -> list[RewardOutput]:
    """Outputs with the same details: NaN where nothing was scored."""
    shapes = {key: value.shape[1:] for part in parts for key, value in part.details.items()}
    for part in parts:
        if not part.valid.any() and not part.details:
            part.details = {
                key: torch.full((len(part.rewards), *shape), math.nan, device=part.rewards.device)
                for key, shape in shapes.items()
            }
    return parts
