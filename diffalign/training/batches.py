"""What a loop over steps is given: batches, and how many of them make the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from diffalign.errors import DiffalignError

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Plan:
    """The size of a run: ``samples`` in the data, in ``effective_batch`` a step, ``steps`` in all."""

    samples: int
    effective_batch: int
    steps: int


class Batches(ABC, Generic[Batch]):
    """How a trainer comes by its batches."""

    samples: int
    """Samples (pairs) in the data."""

    @abstractmethod
    def stream(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """This process's micro-batches, ``gradient_accumulation_steps`` for each step, each a function of its step."""

    def trial(self) -> tuple[Batch, str]:
        """A micro-batch of the largest shape, for a trial, and that shape in words."""
        return next(self.stream(0, 1)), "the size of the run"


class Stopped(DiffalignError):
    """The run was asked to stop (SIGTERM) and has saved a checkpoint."""


class StopAsked(Exception):
    """Raised by :meth:`Batches.stream` before a step, where :meth:`Trainer.stop_asked` says so on every process."""
