"""Which samples make up a step: a pure function of the step, so that a run resumes from the step's number alone.

One bucket: an epoch is a keyed permutation, cut into effective batches; the remainder of an epoch is left out (another
one each epoch). An effective batch is cut into micro-batches last, so the set of samples of a step is the same for
every way to write the effective batch as micro-batch x accumulation x processes. A set smaller than one effective
batch is walked through again and again, a new permutation each time, so a step may then see a sample twice.

Several buckets: a micro-batch comes from one bucket. Each epoch every bucket is permuted and cut into micro-batches
(the remainder left out; a bucket smaller than one micro-batch is filled up by repeating its samples), these are
shuffled and grouped into steps. The set of a step is then the same for every accumulation and number of processes at
the same micro-batch.

In sequence (Selective DPO, arXiv 2502.09650), every epoch has the samples in the order of the data instead.

With weights, every place of an epoch is drawn anew, with replacement, in proportion to them (with several buckets: the
bucket of a micro-batch by the weights in it, then its samples). An epoch is as many draws as there are samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from diffalign.diffusion.random import keyed_generator, keyed_permutation
from diffalign.errors import UserError

collate = default_collate
"""Stack items into a batch: tensors along a new first dimension, dicts key by key, strings into lists."""


class SampleOrder:
    """The order of a run.

    Args:
        bucket_of: the bucket of every sample (all 0 where there is one bucket); its length is the number of samples.
        seed: the run's seed.
        train_batch_size: samples in one micro-batch of one process.
        world_size: number of processes.
        gradient_accumulation_steps: micro-batches of a process in one step.
        weights: how often each sample is drawn, in proportion to the others, (number of samples,), 0 or more; all
            equally often, without replacement, where None.
        sequential: in the order of the data, each epoch alike.

    Raises:
        UserError: no samples, or a count below 1.
    """

    def __init__(
        self,
        bucket_of: Sequence[int],
        *,
        seed: int,
        train_batch_size: int,
        world_size: int = 1,
        gradient_accumulation_steps: int = 1,
        weights: Tensor | None = None,
        sequential: bool = False,
    ) -> None:
        counts = {
            "train_batch_size": train_batch_size,
            "world_size": world_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        }
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if not len(bucket_of):
            raise UserError("there are no samples to train on. Check the split, and what became of ties and bad rows.")
        self.seed = seed
        self.train_batch_size = train_batch_size
        self.world_size = world_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        buckets = torch.as_tensor(bucket_of, dtype=torch.int64)
        self.samples = len(buckets)
        self._buckets = [torch.nonzero(buckets == bucket).flatten() for bucket in torch.unique(buckets)]
        self._weights = None if weights is None else weights.double()
        self._sequential = sequential
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    @property
    def effective_batch(self) -> int:
        """Pairs in one step, over all processes."""
        return self.train_batch_size * self._micro_batches_per_step

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the samples: whole, or below 1 where a step is more than a pass."""
        length = self._epoch_length
        steps = length // self._step_length
        return steps if steps else length / self._step_length

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) in which a step begins."""
        if self.steps_per_epoch >= 1:
            return int(step // self.steps_per_epoch)
        return step * self._step_length // self._epoch_length

    def micro_batch(self, step: int, accumulation_index: int, rank: int) -> list[int]:
        """Indices of the samples of one micro-batch: ``train_batch_size`` of them.

        Args:
            step: optimiser step, from 0.
            accumulation_index: which of the step's micro-batches, from 0.
            rank: process, from 0.
        """
        if not (0 <= accumulation_index < self.gradient_accumulation_steps and 0 <= rank < self.world_size):
            raise ValueError(f"no micro-batch {accumulation_index} on process {rank} in this order")
        which = accumulation_index * self.world_size + rank
        if len(self._buckets) > 1:
            return self._entries(step, which, 1)[0].tolist()
        size = self.train_batch_size
        return self._entries(step, which * size, size).tolist()

    @property
    def _micro_batches_per_step(self) -> int:
        return self.world_size * self.gradient_accumulation_steps

    @property
    def _step_length(self) -> int:
        """Entries of :meth:`_shuffled` in one step: samples, or micro-batches where there are several buckets."""
        return self._micro_batches_per_step if len(self._buckets) > 1 else self.effective_batch

    @property
    def _epoch_length(self) -> int:
        if len(self._buckets) == 1:
            return self.samples
        return sum(max(len(bucket) // self.train_batch_size, 1) for bucket in self._buckets)

    def _entries(self, step: int, offset: int, count: int) -> Tensor:
        """``count`` entries of a step, from ``offset`` on."""
        length = self._epoch_length
        steps = length // self._step_length
        if steps:
            epoch, step = divmod(step, steps)
            start = step * self._step_length + offset
            return self._epoch(epoch)[start : start + count]
        start = step * self._step_length + offset
        places = [divmod(place, length) for place in range(start, start + count)]
        return torch.stack([self._epoch(epoch)[place] for epoch, place in places])

    def _shuffled(self, epoch: int) -> Tensor:
        """The epoch's entries in order: (samples,), or (micro-batches, train_batch_size) with several buckets."""
        if self._weights is not None:
            return self._drawn(self._weights, epoch)
        if len(self._buckets) == 1:
            return self._permuted(self.samples, epoch)
        size = self.train_batch_size
        chunks = []
        for number, bucket in enumerate(self._buckets):
            shuffled = bucket[self._permuted(len(bucket), epoch, number)]
            if len(bucket) < size:
                shuffled = shuffled.repeat(-(-size // len(bucket)))[:size]
            chunks.append(shuffled[: len(shuffled) // size * size].view(-1, size))
        stacked = torch.cat(chunks)
        if self._sequential:
            return stacked[stacked[:, 0].argsort()]
        return stacked[self._permuted(len(stacked), epoch, "micro-batches")]

    def _permuted(self, count: int, epoch: int, *which: int | str) -> Tensor:
        if self._sequential:
            return torch.arange(count)
        return keyed_permutation(count, self.seed, "order", epoch, *which)

    def _drawn(self, weights: Tensor, epoch: int) -> Tensor:
        """:meth:`_shuffled` with replacement."""
        generator = keyed_generator(self.seed, "order", epoch)
        if len(self._buckets) == 1:
            return torch.multinomial(weights, self.samples, replacement=True, generator=generator)
        shares = torch.stack([weights[bucket].sum() for bucket in self._buckets])
        chosen = torch.multinomial(shares, self._epoch_length, replacement=True, generator=generator)
        size = self.train_batch_size
        return torch.stack(
            [
                bucket[torch.multinomial(weights[bucket], size, replacement=True, generator=generator)]
                for bucket in (self._buckets[number] for number in chosen.tolist())
            ]
        )


class OrderSampler(Sampler[list[int]]):
    """The micro-batches of one process from ``start_step`` to ``stop_step``: a ``batch_sampler``."""

    def __init__(self, order: SampleOrder, *, start_step: int, stop_step: int, rank: int = 0) -> None:
        self.order, self.start_step, self.stop_step, self.rank = order, start_step, stop_step, rank

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.stop_step):
            for accumulation_index in range(self.order.gradient_accumulation_steps):
                yield self.order.micro_batch(step, accumulation_index, self.rank)

    def __len__(self) -> int:
        return max(self.stop_step - self.start_step, 0) * self.order.gradient_accumulation_steps
