"""Memory and time of a run on a card, from the costs of its passes.

Memory of a phase is what lies on the card during it and the most that any of its passes adds. Time of a pass is a
roofline: each operation takes as long as its arithmetic or as its memory traffic, whichever is longer, at assumed
shares of what the card can do; and all of them together at least as long as it takes to start them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from diffalign.estimation.cards import Calibration, Card
from diffalign.estimation.meter import Cost, Device
from diffalign.estimation.tracing import networks, trace
from diffalign.estimation.work import Pass, Phase, Work

_FLOAT32 = 4
_IDLE = {"vae", "text_encoders"}
_PART_OF = {"vae_encoder": "vae", "vae_decoder": "vae", "text_encoders": "text_encoders"}
# AdamW reads the weight, its gradient and two moments, and writes all but the gradient.
_OPTIMIZER_TRAFFIC = 7 * _FLOAT32


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase of a run.

    Attributes:
        name: of the phase.
        memory: bytes by what they are for, in the order of a table.
        seconds: by pass, of one optimiser step; empty where the phase is no part of a step, or the card is unknown.
    """

    name: str
    memory: dict[str, int]
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """A run on one card.

    Attributes:
        work, card: of what, on what.
        phases: in order.
        trained: numbers that train.
        source: where the shapes are from.
        memory_factor, time_factor: measured over estimated on this card; already in :attr:`peak` and in the times.
        needed: bytes the card must have, with what CUDA keeps and the allocator wastes.
        flops: of one optimiser step.
    """

    work: Work
    card: Card
    phases: tuple[PhaseEstimate, ...]
    trained: int
    source: str
    memory_factor: float
    time_factor: float
    needed: int
    flops: float

    @property
    def largest(self) -> PhaseEstimate:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """The most bytes in tensors at once."""
        return round(self.largest.peak * self.memory_factor)

    @property
    def fits(self) -> bool:
        return self.needed <= self.card.memory

    @property
    def step_seconds(self) -> float | None:
        """Of one optimiser step; None where nothing is known of the card's speed."""
        if self.card.flops is None:
            return None
        return self.time_factor * sum(sum(phase.seconds.values()) for phase in self.phases)

    @property
    def samples_per_second(self) -> float | None:
        return self.work.samples_per_step / self.step_seconds if self.step_seconds else None

    @property
    def run_seconds(self) -> float | None:
        """Of all steps, without caching and validation."""
        if self.step_seconds is None or self.work.steps is None:
            return None
        return self.step_seconds * self.work.steps


def estimate(work: Work, card: Card, calibration: Calibration, device: Device = "cuda") -> Estimate:
    """Estimate a run on a card.

    Raises:
        UserError: the model's configs cannot be had.
    """
    found = networks(work.model)
    phases = tuple(_phase(work, phase, card, calibration, device) for phase in work.phases)
    memory_factor = calibration.factor(card.name, "memory")
    peak = max(phase.peak for phase in phases) * memory_factor
    in_step = [one for phase in work.phases if phase.in_step for one in phase.passes]
    return Estimate(
        work=work,
        card=card,
        phases=phases,
        trained=found.trained,
        source=found.skeleton.configs.source,
        memory_factor=memory_factor,
        time_factor=calibration.factor(card.name, "time"),
        needed=round(peak * (1 + calibration.fragmentation) + calibration.reserve_gib * 2**30),
        flops=sum(_trace(work, one, device).flops * one.count for one in in_step),
    )


def _trace(work: Work, one: Pass, device: Device) -> Cost:
    return trace(work.model, replace(one, name="", count=1.0, held=1), device)


def _phase(work: Work, phase: Phase, card: Card, calibration: Calibration, device: Device) -> PhaseEstimate:
    found = networks(work.model)
    trained = found.trained * _FLOAT32 // work.shards
    trains = any(one.grad for one in phase.passes)
    costs = [_trace(work, one, device) for one in phase.passes]
    resident = phase.parts - {"rewards"} - (_IDLE if work.offload_idle else set())
    memory = {f"{part} weights": found.frozen_bytes(part) for part in sorted(resident)}
    memory["reward weights"] = _rewards(work, phase)
    if not phase.before_training:
        memory["trained weights"] = trained
        memory["optimiser state"] = found.trained * work.state_bytes // work.shards
        memory["slow copies"] = trained * work.copies
        if work.frozen_copy:
            memory["reference copy"] = trained
        if work.shards > 1:
            # Weights and, in the backward pass, their gradients.
            itemsize = (work.model.autocast or torch.float32).itemsize
            memory["weights brought together"] = (1 + trains) * itemsize * found.together(False)
            if work.stay_together:
                memory["weights brought together"] += itemsize * (found.together(True) - found.together(False))
    if trains:
        memory["gradients"] = trained
    peaks = [cost.peak + cost.saved * (one.held - 1) for cost, one in zip(costs, phase.passes, strict=True)]
    if work.offload_idle:
        at_work = [found.frozen_bytes(_PART_OF[one.network]) if one.network in _PART_OF else 0 for one in phase.passes]
        peaks = [peak + size for peak, size in zip(peaks, at_work, strict=True)]
    memory["activations" if trains else "work space"] = max(peaks, default=0)
    seconds: dict[str, float] = {}
    if phase.in_step and card.flops is not None and card.bandwidth is not None:
        for cost, one in zip(costs, phase.passes, strict=True):
            seconds[one.name] = seconds.get(one.name, 0.0) + one.count * seconds_of(cost, card, calibration)
        if trains:
            traffic = found.trained * _OPTIMIZER_TRAFFIC // work.shards
            seconds["optimiser"] = traffic / (card.bandwidth * calibration.bandwidth_efficiency)
    return PhaseEstimate(phase.name, {name: size for name, size in memory.items() if size}, seconds)


def _rewards(work: Work, phase: Phase) -> int:
    """Bytes of reward models: those that stay, and the largest of those that come when they score."""
    stay = sum(reward.weights for reward in work.rewards if not reward.offloaded)
    come = [reward.weights for reward in work.rewards if reward.offloaded and not reward.judge]
    return stay + (max(come, default=0) if "rewards" in phase.parts else 0)


def seconds_of(cost: Cost, card: Card, calibration: Calibration) -> float:
    """Time of a pass on a card whose speed is known."""
    assert card.flops is not None and card.bandwidth is not None
    flops = card.flops * calibration.matmul_efficiency
    bandwidth = card.bandwidth * calibration.bandwidth_efficiency
    device = sum(n * max(work / flops, moved / bandwidth) for (work, moved), n in cost.work.items())
    return max(device, cost.kernels * calibration.launch_microseconds * 1e-6)


def first_that_fits(
    options: Iterable[tuple[str, Work]], card: Card, calibration: Calibration, device: Device = "cuda", limit: int = 3
) -> list[tuple[str, Estimate]]:
    """The first ``limit`` of some alternatives that fit a card, with what they need.

    Args:
        options: (what is changed, the work then), the nearest to what was asked for first.
        card, calibration, device: as for :func:`estimate`.
        limit: how many to return; others are not looked at.
    """
    found: list[tuple[str, Estimate]] = []
    for name, work in options:
        if len(found) == limit:
            break
        result = estimate(work, card, calibration, device)
        if result.fits:
            found.append((name, result))
    return found
