"""Preference pairs for a reward model: split by prompt, read as pixels, in the order of the run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, Sampler

from diffalign.data.images import BadImage, EncodedImage
from diffalign.data.order import SampleOrder
from diffalign.data.readers import PairSource, open_pairs
from diffalign.diffusion.random import key_seed, keyed_uniform
from diffalign.errors import UserError
from diffalign.rewards.pixels import Preprocess
from diffalign.trainers.reward.config import RewardTrainingConfig

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""A pair of a part and the step that asks for it; step -1 is for evaluation, which augments nothing."""


@dataclass(frozen=True)
class Choice:
    """What is known of a pair without its pictures; ``index`` is its place in the source."""

    index: int
    id: str
    prompt: str
    label: float
    user_id: str | None


class Part:
    """Some pairs of a source. ``part[i]`` is the :class:`Choice`, ``part.pictures(i)`` its two pictures."""

    def __init__(self, source: PairSource, choices: Sequence[Choice]) -> None:
        self.source, self.choices = source, list(choices)
        self.counts = Counter(normalised(choice.prompt) for choice in self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __getitem__(self, index: int) -> Choice:
        return self.choices[index]

    def pictures(self, index: int) -> tuple[EncodedImage, EncodedImage]:
        """The preferred picture and the other one."""
        pair = self.source[self.choices[index].index]
        return pair.chosen, pair.rejected

    def sharing(self, indices: Sequence[int]) -> Tensor:
        """How many pairs of this part share the prompt of each of these, (len(indices),)."""
        return torch.tensor([self.counts[normalised(self.choices[i].prompt)] for i in indices], dtype=torch.float32)

    @property
    def labels(self) -> np.ndarray:
        """Probabilities that the first picture is preferred, (N,), from 0.5 to 1."""
        return np.array([choice.label for choice in self.choices])


@dataclass(frozen=True)
class Parts:
    """The three parts, which share no prompt, and what was done for that."""

    train: Part
    validation: Part
    heldout: Part
    dropped: int
    """Training pairs left out because their prompt is held out."""


def open_parts(config: RewardTrainingConfig) -> Parts:
    """Open the pairs of a config and split them by prompt.

    Where there is a ``heldout_split``, it stays as it is, and training pairs with its prompts are left out.

    Raises:
        UserError: see :func:`diffalign.data.readers.open_pairs`; or a part has no pair that is not a tie.
    """
    source, choices = _read(config, config.dataset_split)
    shares = [config.validation_share]
    heldout, dropped = None, 0
    if config.heldout_split:
        heldout = Part(*_read(config, config.heldout_split))
        kept = [choice for choice in choices if normalised(choice.prompt) not in heldout.counts]
        dropped = len(choices) - len(kept)
        choices = kept
        if dropped:
            logger.warning("%d training pairs left out: their prompts are in %s", dropped, config.heldout_split)
    else:
        shares.append(config.heldout_share)
    groups = split_by_prompt([choice.prompt for choice in choices], shares, config.split_seed)
    parts = [Part(source, [choice for choice, g in zip(choices, groups, strict=True) if g == n]) for n in range(3)]
    result = Parts(parts[0], parts[1], heldout or parts[2], dropped)
    for name in ("train", "validation", "heldout"):
        if not any(choice.label != 0.5 for choice in getattr(result, name).choices):
            raise UserError(
                f"{source.name}: the {name} part has no pair that is not a tie ({len(choices)} pairs over "
                f"{len({choice.prompt for choice in choices})} prompts to split). Give more pairs, or change "
                "validation_share and heldout_share."
            )
    return result


def _read(config: RewardTrainingConfig, split: str) -> tuple[PairSource, list[Choice]]:
    source = open_pairs(
        config.dataset_name,
        split=split,
        config_name=config.dataset_config_name,
        columns=config.columns,
        ties=config.ties,
        max_bad_rows=config.max_bad_rows,
        max_pairs=config.max_train_samples if split == config.dataset_split else None,
    )
    assert isinstance(source, PairSource)
    choices = []
    for index in range(len(source)):
        try:
            pair = source[index]
            for picture in (pair.chosen, pair.rejected):
                picture.inspect()
        except BadImage as error:
            source.bad_rows.add(error)
            continue
        choices.append(Choice(index, pair.id, pair.prompt, pair.label, pair.user_id))
    return source, choices


def normalised(prompt: str) -> str:
    """What two prompts are compared by: lower case, without outer and double blanks."""
    return " ".join(prompt.lower().split())


def split_by_prompt(prompts: Sequence[str], shares: Sequence[float], seed: int) -> list[int]:
    """A group for each row, so that rows of one prompt are together: 1, 2, ... for the shares, 0 for the rest.

    Prompts are ordered by a hash of seed and prompt and cut by number of prompts, so the group of a prompt does not
    depend on the order of rows. Each share gets one prompt at least where there are enough.
    """
    unique = sorted({normalised(prompt) for prompt in prompts}, key=lambda prompt: key_seed(seed, "split", prompt))
    group: dict[str, int] = {}
    start = 0
    for number, share in enumerate(shares, 1):
        count = max(1, round(share * len(unique)))
        group.update(dict.fromkeys(unique[start : start + count], number))
        start += count
    return [group.get(normalised(prompt), 0) for prompt in prompts]


class PixelPairs(Dataset[dict[str, object]]):
    """Pairs as the pixels a model takes. ``pairs[i, step]`` is augmented by a draw keyed by seed, step and pair.

    Args:
        part: the pairs.
        preprocess: of the model.
        flip: flip half of the pairs.
        shift: largest shift, as a share of the side; what is uncovered repeats the border.
        seed: of the run.
    """

    def __init__(self, part: Part, preprocess: Preprocess, *, flip: bool, shift: float, seed: int) -> None:
        self.part, self.preprocess, self.seed = part, preprocess, seed
        self.flip, self.reach = flip, round(shift * preprocess.crop)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: Key) -> dict[str, object]:
        index, step = key
        pictures = torch.stack([self._pixels(picture) for picture in self.part.pictures(index)])
        if step >= 0:
            pictures = self._augment(pictures, self.part[index].id, step)
        return {"index": index, "chosen": pictures[0], "rejected": pictures[1]}

    def _pixels(self, picture: EncodedImage) -> Tensor:
        image = torch.from_numpy(np.array(picture.decode())).permute(2, 0, 1).float() / 255
        return self.preprocess(image[None], exact=True)[0]

    def _augment(self, pictures: Tensor, pair_id: str, step: int) -> Tensor:
        draws = keyed_uniform([(self.seed, purpose, step, pair_id) for purpose in ("flip", "down", "right")]).tolist()
        if self.flip and draws[0] < 0.5:
            pictures = pictures.flip(-1)
        if self.reach:
            side = pictures.shape[-1]
            top, left = (int(draw * (2 * self.reach + 1)) for draw in draws[1:])
            around = pad(pictures, [self.reach] * 4, mode="replicate")
            pictures = around[..., top : top + side, left : left + side]
        return pictures


class EmbeddedPairs(Dataset[dict[str, object]]):
    """Pairs whose embeddings are in memory: what a head trains on.

    Args:
        chosen, rejected, texts: unit embeddings (N, P), float32, CPU.
    """

    def __init__(self, chosen: Tensor, rejected: Tensor, texts: Tensor) -> None:
        self.chosen, self.rejected, self.texts = chosen, rejected, texts

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Key) -> dict[str, object]:
        index, _ = key
        return {
            "index": index,
            "chosen": self.chosen[index],
            "rejected": self.rejected[index],
            "text": self.texts[index],
        }


class StepSampler(Sampler[list[Key]]):
    """The micro-batches of one process from ``start_step`` to ``stop_step``, each pair with its step."""

    def __init__(self, order: SampleOrder, *, start_step: int, stop_step: int, rank: int) -> None:
        self.order, self.start_step, self.stop_step, self.rank = order, start_step, stop_step, rank

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.stop_step):
            for accumulation_index in range(self.order.gradient_accumulation_steps):
                yield [(index, step) for index in self.order.micro_batch(step, accumulation_index, self.rank)]


def indices_of_step(order: SampleOrder, step: int) -> list[int]:
    """All pairs of a step, over accumulation and processes."""
    micro = range(order.gradient_accumulation_steps)
    return [index for a in micro for rank in range(order.world_size) for index in order.micro_batch(step, a, rank)]
