"""Scoring folders of drawn images: what was scored once is kept, and several processes share the work.

Scores are kept in a :class:`diffalign.rewards.score_cache.ScoreCache` as they are made. With several processes each
scores its share of the images into it; then the first one reads all of them from there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from tqdm.auto import tqdm

from diffalign.data.prompts import Prompt
from diffalign.evaluation.folder import Case, SampleFolder
from diffalign.rewards.base import Reward
from diffalign.rewards.combine import RewardSpec, load_rewards
from diffalign.rewards.failures import FailureLedger, FailurePolicy, guarded
from diffalign.rewards.inputs import as_rows
from diffalign.rewards.reward_set import Member
from diffalign.rewards.score_cache import CachedReward, ScoreCache

Floats = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)
CACHE = "cache"


class Judge:
    """Scores images of cases by rewards; each is loaded alone, and let go when it has scored everything.

    Args:
        rewards: names, or mappings as in the rewards of a training run. Here every one judges.
        root: the folder of the evaluation; scores are kept in it.
        groupwise: rewards that compare the images of one prompt, by name.
        device: of the models. By default each process's own.

    Raises:
        UserError: a reward is unknown, cannot judge a prompt or has no checkpoint: before hours of drawing.
    """

    def __init__(
        self,
        rewards: Sequence[Any],
        root: Path,
        prompts: Sequence[Prompt],
        cases: Sequence[Case],
        *,
        groupwise: Mapping[str, Reward] | None = None,
        policy: FailurePolicy | None = None,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.prompts, self.cases = prompts, cases
        self.policy, self.batch_size = policy or FailurePolicy(), batch_size
        self.state, self.ledger = PartialState(cpu=device == "cpu"), FailureLedger()
        # eval_only tells apart in training what judges and what is trained by; here all judge.
        specs = [
            replace(RewardSpec.of(item, f"rewards[{index}]"), eval_only=False) for index, item in enumerate(rewards)
        ]
        options: dict[str, Any] = {"device": own_device(device), "batch_size": batch_size}
        members = list(load_rewards(specs, **options).members) if specs else []
        several = [Member(name, one) for name, one in (groupwise or {}).items()]
        texts, rows = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        for member in [*members, *several]:
            as_rows(rows, len(prompts), member.name, member.reward.required_metadata)
            member.reward.check_prompts(texts)
            assert member.reward.identity
        cache = ScoreCache(root / CACHE)
        self.members, self.groupwise = (
            [replace(member, reward=CachedReward(member.reward, cache)) for member in some]
            for some in (members, several)
        )

    def share(self, folders: Mapping[K, SampleFolder]) -> None:
        """With several processes: score this one's share of everything, and wait for the others."""
        rank, ranks = self.state.process_index, self.state.num_processes
        if ranks == 1:
            return
        for member in [*self.members, *self.groupwise]:
            work = [(folder, chunk) for folder in folders.values() for chunk in self._chunks()][rank::ranks]
            total = sum(len(chunk) for _, chunk in work)
            try:
                with tqdm(total=total, unit="image", desc=f"{ranks} processes, each: {member.name}",
                          disable=rank > 0) as bar:  # fmt: skip
                    for folder, chunk in work:
                        self._score(member, folder, chunk)
                        bar.update(len(chunk))
            finally:
                member.reward.close()
        self.ledger = FailureLedger()  # the first process counts all of it anew
        self.state.wait_for_everyone()

    def outputs(self, member: Member, folders: Mapping[K, SampleFolder]) -> dict[K, tuple[Floats, dict[str, Floats]]]:
        """Scores of each folder's images, (n,) in the order of the cases, NaN where there is none, and their details.

        Raises:
            RewardError: an image cannot be scored, and the policy does not bear it. What was scored is kept.
        """
        parts: dict[K, list[tuple[Floats, dict[str, Floats]]]] = {key: [] for key in folders}
        total = len(folders) * len(self.cases)
        try:
            with tqdm(total=total, unit="image", desc=member.name) as bar:
                for key, folder in folders.items():
                    for chunk in self._chunks():
                        parts[key].append(self._score(member, folder, chunk))
                        bar.update(len(chunk))
        finally:
            member.reward.close()
        return {key: _joined(several) for key, several in parts.items()}

    def scores(self, member: Member, folders: Mapping[K, SampleFolder]) -> dict[K, Floats]:
        """As :meth:`outputs`, without the details."""
        return {key: rewards for key, (rewards, _) in self.outputs(member, folders).items()}

    def _score(self, member: Member, folder: SampleFolder, chunk: Sequence[Case]) -> tuple[Floats, dict[str, Floats]]:
        output = guarded(
            member.reward,
            [folder.image(case) for case in chunk],
            [case.prompt for case in chunk],
            [self.prompts[case.index].metadata for case in chunk],
            group_ids=[case.index for case in chunk] if member.reward.mode == "groupwise" else None,
            policy=self.policy,
            ledger=self.ledger,
            names=[str(folder.path / case.file) for case in chunk],
        )
        details = {key: value.double().cpu().numpy() for key, value in output.details.items()}
        return output.rewards.double().cpu().numpy(), details

    def _chunks(self) -> Iterator[list[Case]]:
        """Cases that are scored together: whole prompts, about ``batch_size`` images."""
        chunk: list[Case] = []
        for position, case in enumerate(self.cases):
            if len(chunk) >= self.batch_size and case.index != self.cases[position - 1].index:
                yield chunk
                chunk = []
            chunk.append(case)
        yield chunk


def own_device(device: str | None) -> str | None:
    """The device asked for; by default, with several processes, this one's."""
    state = PartialState(cpu=device == "cpu")
    return str(state.device) if device is None and state.num_processes > 1 else device


def _joined(parts: Sequence[tuple[Floats, dict[str, Floats]]]) -> tuple[Floats, dict[str, Floats]]:
    shared = set(parts[0][1]).intersection(*(details for _, details in parts))
    return (
        np.concatenate([rewards for rewards, _ in parts]),
        {key: np.concatenate([details[key] for _, details in parts]) for key in shared},
    )
