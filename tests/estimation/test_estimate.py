"""An estimate is arithmetic on the costs of passes: by hand, and in the direction that it must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.estimation import estimate as module
from diffalign.estimation.cards import Calibration, Card, load_calibration
from diffalign.estimation.estimate import Estimate, estimate, first_that_fits, seconds_of
from diffalign.estimation.meter import Cost
from diffalign.estimation.work import Model, Pass, Phase, RewardModel, Work

MIB, GIB = 2**20, 2**30
CARD = Card("a card", 2 * GIB, flops=1e12, bandwidth=1e11)
# 0.5 TFLOP/s and 80 GB/s are reached.
ASSUMED = Calibration(
    matmul_efficiency=0.5,
    bandwidth_efficiency=0.8,
    launch_microseconds=5,
    reserve_gib=0.5,
    fragmentation=0.1,
    memory_error=0.0,
    time_error=0.0,
)
COSTS = {
    ("denoiser", False): Cost(0, 10 * MIB, 10**9, 10**6, 1, {(10**9, 10**6): 1}),
    ("denoiser", True): Cost(30 * MIB, 40 * MIB, 3 * 10**9, 10**6, 1, {(3 * 10**9, 10**6): 1}),
    ("vae_decoder", False): Cost(0, 100 * MIB, 0, 8 * 10**8, 1, {(0, 8 * 10**8): 1}),
    ("vae_encoder", False): Cost(0, 50 * MIB, 0, 10**6, 1, {(0, 10**6): 1}),
}
WEIGHTS = {"denoiser": 1000 * MIB, "vae": 200 * MIB, "text_encoders": 300 * MIB}
TRAINED = 2**20
"""Numbers: 4 MiB in float32."""
STEP = Phase(
    "step",
    (Pass("reference", "denoiser", 2, count=3), Pass("policy", "denoiser", 2, count=3, grad=True)),
    frozenset({"denoiser"}),
)
ROLLOUT = Phase("rollout", (Pass("decode", "vae_decoder", 1, count=4),), frozenset({"denoiser", "vae", "rewards"}))
CACHING = Phase(
    "caching", (Pass("encode", "vae_encoder", 8),), frozenset({"vae", "text_encoders"}), False, before_training=True
)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks of round numbers, in place of those of a model."""
    networks = SimpleNamespace(
        trained=TRAINED,
        frozen_bytes=WEIGHTS.__getitem__,
        together=lambda stay: TRAINED if stay else TRAINED // 4,
        skeleton=SimpleNamespace(configs=SimpleNamespace(source="here")),
    )
    monkeypatch.setattr(module, "networks", lambda model: networks)
    monkeypatch.setattr(module, "trace", lambda model, one, device: COSTS[one.network, one.grad])
    yield


def run(*phases: Phase, card: Card = CARD, assumed: Calibration = ASSUMED, **more: Any) -> Estimate:
    return estimate(Work(Model("m"), phases, samples_per_step=6, **more), card, assumed)


def test_time_is_the_longer_of_arithmetic_and_traffic_or_of_starting_kernels() -> None:
    # 2 ms of arithmetic and 0.1 ms of traffic; three times 10 ms of traffic alone.
    cost = Cost(0, 0, 10**9, 0, 4, {(10**9, 8 * 10**6): 1, (0, 8 * 10**8): 3})
    assert seconds_of(cost, CARD, ASSUMED) == pytest.approx(0.032)
    assert seconds_of(replace(cost, kernels=10_000), CARD, ASSUMED) == pytest.approx(0.05)


def test_memory_and_time_of_a_step_by_hand(by_hand: None) -> None:
    found = run(CACHING, STEP, steps=100)
    caching, step = found.phases
    assert caching.memory == {
        "text_encoders weights": 300 * MIB,
        "vae weights": 200 * MIB,
        "work space": 50 * MIB,
    }
    assert caching.seconds == {}, "not a part of a step"
    # AdamW keeps two numbers for each that trains.
    assert step.memory == {
        "denoiser weights": 1000 * MIB,
        "trained weights": 4 * MIB,
        "optimiser state": 8 * MIB,
        "gradients": 4 * MIB,
        "activations": 40 * MIB,
    }
    assert found.largest is step and found.peak == 1056 * MIB
    assert found.needed == pytest.approx(1.1 * 1056 * MIB + 0.5 * GIB, abs=1)
    # 3 x 2 ms and 3 x 6 ms of arithmetic, and 7 float32 numbers of traffic for each that trains.
    assert step.seconds == pytest.approx({"reference": 0.006, "policy": 0.018, "optimiser": 28 * TRAINED / 8e10})
    total = 0.024 + 28 * TRAINED / 8e10
    assert found.step_seconds == pytest.approx(total)
    assert found.samples_per_second == pytest.approx(6 / total) and found.run_seconds == pytest.approx(100 * total)
    assert found.flops == 3 * (10**9 + 3 * 10**9) and found.source == "here"


def test_a_run_fits_up_to_the_last_byte(by_hand: None) -> None:
    needed = run(STEP).needed
    assert run(STEP, card=replace(CARD, memory=needed)).fits
    assert not run(STEP, card=replace(CARD, memory=needed - 1)).fits


def test_a_card_without_a_speed_has_no_times(by_hand: None) -> None:
    found = run(STEP, steps=100, card=Card("c", GIB))
    assert found.step_seconds is None and found.samples_per_second is None and found.run_seconds is None
    assert found.phases[0].seconds == {} and found.peak == run(STEP).peak


def test_what_was_measured_on_a_card_scales_its_estimates(by_hand: None) -> None:
    measured = replace(ASSUMED, cards={"a card": {"time": 2.0, "memory": 1.5}, "another": {"time": 9.0}})
    plain, found = run(STEP), run(STEP, assumed=measured)
    assert plain.step_seconds is not None and found.step_seconds == pytest.approx(2 * plain.step_seconds)
    assert found.peak == 1.5 * plain.peak
    assert found.needed == pytest.approx(1.5 * 1.1 * plain.peak + 0.5 * GIB, abs=1)


def test_copies_of_what_trains(by_hand: None) -> None:
    memory = run(STEP, copies=2, frozen_copy=True, state_bytes=2).phases[0].memory
    assert memory["slow copies"] == 8 * MIB and memory["reference copy"] == 4 * MIB
    assert memory["optimiser state"] == 2 * MIB


def test_passes_whose_activations_are_kept_together(by_hand: None) -> None:
    held = replace(STEP, passes=(replace(STEP.passes[1], held=4),))
    assert run(held).phases[0].memory["activations"] == (40 + 3 * 30) * MIB


def test_idle_parts_count_only_while_they_work(by_hand: None) -> None:
    plain, away = (run(ROLLOUT, offload_idle=idle).phases[0].memory for idle in (False, True))
    assert plain["vae weights"] == 200 * MIB and plain["work space"] == 100 * MIB
    assert "vae weights" not in away and away["work space"] == (100 + 200) * MIB
    assert away["denoiser weights"] == plain["denoiser weights"]


def test_rewards_stay_or_come_one_at_a_time(by_hand: None) -> None:
    rewards = (
        RewardModel("stays", 10 * MIB, offloaded=False),
        RewardModel("comes", 20 * MIB, offloaded=True),
        RewardModel("comes too", 30 * MIB, offloaded=True),
        RewardModel("judges", 900 * MIB, offloaded=True, judge=True),
    )
    rollout, step = run(ROLLOUT, STEP, rewards=rewards).phases
    assert rollout.memory["reward weights"] == 40 * MIB, "the one that stays, and the larger of those that come"
    assert step.memory["reward weights"] == 10 * MIB


def test_what_is_shared_out(by_hand: None) -> None:
    full = Model("m", full=True, autocast=torch.bfloat16)
    alone, shared = (
        estimate(Work(full, (STEP,), 6, frozen_copy=True, shards=shards), CARD, ASSUMED).phases[0].memory
        for shards in (1, 4)
    )
    for name in ("trained weights", "gradients", "optimiser state", "reference copy"):
        assert shared[name] == alone[name] / 4
    # A quarter is together at once: in bfloat16, with its gradients.
    assert shared["weights brought together"] == 2 * 2 * TRAINED // 4 and "weights brought together" not in alone


def test_the_first_alternatives_that_fit_and_no_more_are_looked_at(by_hand: None) -> None:
    looked_at = []

    def options() -> Iterator[tuple[str, Work]]:
        for index, copies in enumerate((400, 300, 2, 1, 0, 0)):
            looked_at.append(index)
            yield str(index), Work(Model("m"), (STEP,), 6, copies=copies)

    found = first_that_fits(options(), CARD, ASSUMED, limit=2)
    assert [name for name, _ in found] == ["2", "3"] and all(result.fits for _, result in found)
    assert looked_at == [0, 1, 2, 3, 4], "one more is drawn, and not estimated"


def bundled(samples: int = 2, **changes: Any) -> Estimate:
    """A step of the bundled model, from its real networks."""
    passes = (Pass("policy", "denoiser", samples, grad=True),)
    model = Model(**{"path": "shapes-sdxl", "rank": 4, **changes})
    return estimate(Work(model, (Phase("step", passes, frozenset({"denoiser"})),), samples), CARD, load_calibration())


def test_more_of_anything_needs_more() -> None:
    """Batch, pixels and rank: memory, arithmetic and time of a step all grow; twice the batch is twice the work."""
    base = bundled()
    for more in (bundled(samples=4), bundled(height=128, width=128), bundled(rank=16)):
        assert more.peak > base.peak and more.needed > base.needed and more.flops > base.flops
        assert more.step_seconds is not None and base.step_seconds is not None
        assert more.step_seconds >= base.step_seconds
    assert bundled(samples=4).flops == pytest.approx(2 * base.flops, rel=0.05)
    assert bundled(rank=16).trained == 4 * base.trained


def test_no_gpu_is_asked_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("CUDA was asked for")

    for name in ("is_available", "get_device_properties", "current_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    assert bundled(samples=3).step_seconds
