"""``diffalign score``: score images by rewards, resumable, with a policy for those that cannot be scored."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffalign.config import field
from diffalign.data.images import BadImage, EncodedImage
from diffalign.errors import UserError
from diffalign.evaluation.listing import ListedImage, list_images, with_prompts
from diffalign.evaluation.score_file import Row, ScoreFile, plain
from diffalign.rewards.combine import load_rewards
from diffalign.rewards.failures import FailureLedger, FailurePolicy, guarded
from diffalign.rewards.inputs import as_rows
from diffalign.rewards.output import RewardOutput
from diffalign.rewards.reward_set import Member

logger = logging.getLogger(__name__)

__all__ = ["ScoreConfig", "Summary", "run_score"]
_AHEAD = 2


@dataclass(kw_only=True)
class ScoreConfig:
    """Score images by rewards, to JSONL or CSV. A run that was stopped goes on where it was."""

    images: list[str] = field(
        [],
        help="Images: a folder, one made by diffalign sample or with a metadata.jsonl; files; a pattern such as "
        "'out/*.png'; or a .jsonl of files and prompts. May also stand before the flags.",
    )
    reward: list[Any] = field([], help="Rewards: names, NAME:CHECKPOINT, path/to/file.py:Class, remote:ADDRESS/NAME.")
    out: str = field(help="File for the scores, .jsonl or .csv; rows of a .csv are also kept in a .jsonl beside it.")
    overwrite: bool = field(False, help="Score anew what the file has already, and replace it.")
    prompts: list[str] | None = field(None, help="Prompts as words: one for all images, or one for each in order.")
    prompts_file: str | None = field(
        None, help='Prompts: a text file with a line an image, or a JSONL file of {"prompt": ..., "file": ...}.'
    )

    batch_size: int = field(32, help="Images scored at once; as many are scored again after a kill.")
    device: str | None = field(None, help="Device of the models. Default: a GPU if there is one.")
    dtype: Literal["fp32", "fp16", "bf16"] = field("fp32", help="Type of the models' weights; scores are float32.")
    num_workers: int = field(4, help="Threads that read images ahead.")

    on_failure: Literal["stop", "retry", "drop"] = field(
        "stop", help="What to do about an image that cannot be scored: stop, try again and then stop, or leave it out."
    )
    retries: int = field(3, help="With retry: how often to try again, with pauses of 1, 2, 4 ... seconds.")
    max_failed_share: float = field(0.05, help="With drop: stop when more than this share of the images has failed.")

    def __post_init__(self) -> None:
        if not self.images:
            raise UserError(
                "which images? diffalign score IMAGES --reward NAME --out FILE: a folder, files, a pattern."
            )
        if not self.reward:
            raise UserError("which reward? diffalign score IMAGES --reward NAME; diffalign rewards lists them.")
        for name in ("batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.policy()

    def policy(self) -> FailurePolicy:
        """What is done about images that cannot be scored."""
        return FailurePolicy(self.on_failure, self.retries, max_failed_share=self.max_failed_share)


@dataclass(frozen=True)
class Summary:
    """What a reward says of all images together; mean and median are NaN where none has a score."""

    name: str
    mean: float
    median: float
    n: int
    failed: int

    def __str__(self) -> str:
        return f"{self.name}: mean {self.mean:.4g}, median {self.median:.4g}, n {self.n}, failed {self.failed}"


def run_score(config: ScoreConfig) -> list[Summary]:
    """Score what has no score yet, write the file, print and return a summary of each reward.

    Raises:
        UserError: an image, prompt, reward or setting is wrong, or the file holds something else; nothing is scored
            then. Also for an image that cannot be read, unless the policy is to drop it.
        RewardError: an image cannot be scored, and the policy does not bear it. What was scored is kept.
    """
    images = with_prompts(list_images(config.images), config.prompts, config.prompts_file)
    file = ScoreFile(config.out)
    rewards = load_rewards(config.reward, device=config.device, dtype=config.dtype, batch_size=config.batch_size)
    try:
        for member in rewards.members:
            _check(member, images)
        identities = {member.name: member.reward.identity for member in rewards.members}
        file.open([image.file for image in images], identities, overwrite=config.overwrite)
        _Run(config, images, rewards.members, identities, file).work()
    finally:
        rewards.close()
    file.finish([image.file for image in images])
    summaries = [_summary(name, [file.rows[image.file] for image in images]) for name in identities]
    for summary in summaries:
        print(summary)
    print(file.path)
    return summaries


def _check(member: Member, images: Sequence[ListedImage]) -> None:
    """Find out that a prompt is missing, or cannot be judged, before anything is scored."""
    reward = member.reward
    as_rows([image.metadata for image in images], len(images), member.name, reward.required_metadata)
    if not reward.uses_prompt and reward.mode == "pointwise":
        return
    lacking = [image for image in images if image.prompt is None]
    if lacking:
        raise UserError(
            f"the reward {member.name} needs the prompts of the images, and {len(lacking)} of {len(images)} have "
            f"none, such as {lacking[0].file}. Give --prompts 'one for all', --prompts_file FILE, or a folder with a "
            "metadata.jsonl or with a text file beside each image."
        )
    reward.check_prompts([str(image.prompt) for image in images])


@dataclass
class _Read:
    """An image that has been read, or why it cannot be."""

    digest: str = ""
    picture: Image.Image | None = None
    problem: BadImage | None = None


class _Run:
    """The work of one call of :func:`run_score`."""

    def __init__(
        self,
        config: ScoreConfig,
        images: Sequence[ListedImage],
        members: Sequence[Member],
        identities: Mapping[str, str],
        file: ScoreFile,
    ) -> None:
        self.images, self.members, self.identities, self.file = images, members, identities, file
        self.policy, self.ledger = config.policy(), FailureLedger()
        self.batch_size, self.workers = config.batch_size, config.num_workers
        self.groupwise = any(member.reward.mode == "groupwise" for member in members)
        numbers: dict[str | None, int] = {}
        self.groups = [numbers.setdefault(image.prompt, len(numbers)) for image in images]

    def work(self) -> None:
        """Score everything that is missing, a batch at a time; its rows are written before the next."""
        with tqdm(total=len(self.images), unit="image", desc="score") as bar:
            for batch, read in self._read_ahead():
                rows = self._rows(batch, read)
                if rows:
                    self.file.add(rows)
                bar.update(len(batch))

    def _batches(self) -> Iterator[list[int]]:
        """Indices of images that are scored together; all images of a prompt, if a reward compares them."""
        units: dict[int, list[int]] = {}
        for index in range(len(self.images)):
            units.setdefault(self.groups[index] if self.groupwise else index, []).append(index)
        batch: list[int] = []
        for unit in units.values():
            if batch and len(batch) + len(unit) > self.batch_size:
                yield batch
                batch = []
            batch = batch + unit
        if batch:
            yield batch

    def _read_ahead(self) -> Iterator[tuple[list[int], list[_Read]]]:
        """Batches with their images, which threads read while earlier ones are scored."""
        waiting: deque[tuple[list[int], list[Future[_Read]]]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="read-images") as pool:
            try:
                for batch in self._batches():
                    waiting.append((batch, [pool.submit(self._read, self.images[index]) for index in batch]))
                    if len(waiting) > _AHEAD:
                        yield _done(waiting)
                while waiting:
                    yield _done(waiting)
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, image: ListedImage) -> _Read:
        try:
            encoded = EncodedImage.wrap(image.path, "image")
            digest = hashlib.blake2b(encoded.read(), digest_size=16).hexdigest()
            if all(self.file.known(image, digest, name) for name in self.identities) and not self.groupwise:
                return _Read(digest)
            return _Read(digest, encoded.decode())
        except BadImage as error:
            return _Read(problem=error)

    def _rows(self, batch: Sequence[int], read: Sequence[_Read]) -> list[Row]:
        """New rows of the images of a batch that had not every score."""
        rows: dict[int, Row] = {}
        for member in self.members:
            todo = self._missing(member, batch, read)
            bad = [k for k in todo if read[k].problem is not None]
            self._mind(member, [read[k] for k in bad])
            good = [k for k in todo if read[k].problem is None]
            output = self._score(member, [batch[k] for k in good], [read[k] for k in good])
            for k in todo:
                rows.setdefault(k, self._row(self.images[batch[k]], read[k].digest))
            for k in bad:
                _enter(rows[k], member.name, None, str(read[k].problem))
            for place, k in enumerate(good):
                valid = bool(output.valid[place])
                score = plain(output.rewards[place].item()) if valid else None
                _enter(rows[k], member.name, score, output.messages[place])
                rows[k]["scorers"][member.name] = self.identities[member.name]
        return [rows[k] for k in sorted(rows)]

    def _missing(self, member: Member, batch: Sequence[int], read: Sequence[_Read]) -> list[int]:
        """Places in the batch without a score of this reward; with them the rest of their groups."""
        lacking = [k for k, i in enumerate(batch) if not self.file.known(self.images[i], read[k].digest, member.name)]
        if member.reward.mode == "pointwise":
            return lacking
        groups = {self.groups[batch[k]] for k in lacking}
        return [k for k, i in enumerate(batch) if self.groups[i] in groups]

    def _mind(self, member: Member, bad: Sequence[_Read]) -> None:
        """Images that cannot be read are failures; to try again would not help."""
        if not bad:
            return
        if self.policy.on_failure != "drop":
            raise UserError(f"{bad[0].problem} Or leave out what cannot be scored: --on_failure drop.")
        count, messages = len(bad), [str(one.problem) for one in bad]
        nothing = RewardOutput(torch.full((count,), torch.nan), {}, torch.zeros(count, dtype=torch.bool), [*messages])
        self.ledger.add(member.name, nothing)
        self.ledger.check(member.name, self.policy)

    def _score(self, member: Member, indices: Sequence[int], read: Sequence[_Read]) -> RewardOutput:
        chosen = [self.images[index] for index in indices]
        return guarded(
            member.reward,
            [one.picture for one in read if one.picture is not None],
            [image.prompt or "" for image in chosen],
            [image.metadata for image in chosen],
            group_ids=[self.groups[index] for index in indices] if member.reward.mode == "groupwise" else None,
            policy=self.policy,
            ledger=self.ledger,
            names=[image.file for image in chosen],
        )

    def _row(self, image: ListedImage, digest: str) -> Row:
        """The row of an image with the scores that still hold."""
        row = self.file.rows.get(image.file)
        fresh: Row = {"file": image.file, "prompt": image.prompt, "digest": digest, "scores": {}, "scorers": {}}
        if row is None or row.get("digest") != digest or row.get("prompt") != image.prompt:
            if row is not None and row.get("digest"):
                logger.info("%s has changed since it was scored, and is scored again", image.file)
            return fresh
        kept = {key: dict(row.get(key, {})) for key in ("scores", "scorers", "errors")}
        return {**fresh, **{key: value for key, value in kept.items() if value or key != "errors"}}


def _done(waiting: deque[tuple[list[int], list[Future[_Read]]]]) -> tuple[list[int], list[_Read]]:
    batch, futures = waiting.popleft()
    return batch, [future.result() for future in futures]


def _enter(row: Row, name: str, score: float | None, message: str | None) -> None:
    row["scores"][name] = score
    errors = row.setdefault("errors", {})
    errors.pop(name, None)
    if score is None:
        errors[name] = message
    if not errors:
        del row["errors"]


def _summary(name: str, rows: Sequence[Row]) -> Summary:
    scores = [row["scores"][name] for row in rows if row["scores"].get(name) is not None]
    mean, median = (float(np.mean(scores)), float(np.median(scores))) if scores else (float("nan"), float("nan"))
    return Summary(name, mean, median, len(scores), len(rows) - len(scores))
