"""The data order is a pure function of the step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from diffalign.data.order import OrderSampler, SampleOrder, collate
from diffalign.errors import UserError

FACTORS = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1), (1, 1, 8)]


def order(bucket_of, factors=(8, 1, 1), seed=3):
    size, accumulation, world = factors
    return SampleOrder(
        bucket_of,
        seed=seed,
        train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        world_size=world,
    )


def step_pairs(which, step):
    return [
        pair
        for accumulation in range(which.gradient_accumulation_steps)
        for rank in range(which.world_size)
        for pair in which.micro_batch(step, accumulation, rank)
    ]


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("pairs", [5, 37])
def test_a_step_is_the_same_set_for_every_factorisation(factors, pairs):
    for step in range(12):
        expected = step_pairs(order([0] * pairs), step)
        assert Counter(step_pairs(order([0] * pairs, factors), step)) == Counter(expected)


def test_an_epoch_visits_no_pair_twice_and_epochs_differ():
    which = order([0] * 37)
    assert which.steps_per_epoch == 4
    epochs = [[pair for step in range(4 * e, 4 * e + 4) for pair in step_pairs(which, step)] for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 32
    assert epochs[0] != epochs[1] != epochs[2]
    assert [which.epoch_of(step) for step in (0, 3, 4, 8)] == [0, 0, 1, 2]


def test_another_seed_is_another_order():
    assert step_pairs(order([0] * 37, seed=1), 0) != step_pairs(order([0] * 37, seed=2), 0)


def test_a_set_smaller_than_a_step_is_repeated_evenly():
    which = order([0] * 3)
    seen = Counter(pair for step in range(3) for pair in step_pairs(which, step))
    assert seen == {0: 8, 1: 8, 2: 8}
    assert which.steps_per_epoch == pytest.approx(3 / 8)
    assert [which.epoch_of(step) for step in (0, 1, 2)] == [0, 2, 5]


@pytest.mark.parametrize("factors", [(2, 2, 2), (2, 1, 4), (2, 4, 1)])
def test_buckets_are_never_mixed_and_steps_do_not_depend_on_the_processes(factors):
    buckets = [0] * 20 + [1] * 9 + [2]
    which, single = order(buckets, factors), order(buckets, (2, 4, 1))
    for step in range(10):
        for accumulation in range(which.gradient_accumulation_steps):
            for rank in range(which.world_size):
                batch = which.micro_batch(step, accumulation, rank)
                assert len(batch) == 2
                assert len({buckets[pair] for pair in batch}) == 1
        assert Counter(step_pairs(which, step)) == Counter(step_pairs(single, step))


def test_a_bucket_smaller_than_a_micro_batch_is_filled_by_repetition():
    buckets = [0] * 8 + [1]
    which = order(buckets, (4, 3, 1))
    assert which.steps_per_epoch == 1
    assert sorted(step_pairs(which, 0)) == [*range(8), 8, 8, 8, 8]


def test_resume_from_any_step_continues_the_same_batches():
    which = order([0] * 37, (2, 2, 2))
    whole = list(OrderSampler(which, start_step=0, stop_step=11, rank=1))
    rest = list(OrderSampler(order([0] * 37, (2, 2, 2)), start_step=7, stop_step=11, rank=1))
    assert rest == whole[14:]
    assert len(OrderSampler(which, start_step=7, stop_step=11, rank=1)) == 8


def test_loader_with_the_sampler():
    text = {i: {"prompt_embeds": torch.full((2, 3), float(i))} for i in range(9)}
    items = [{"id": torch.tensor(i), "text": text[i], "prompt": str(i)} for i in range(9)]
    sampler = OrderSampler(order([0] * 9, (3, 1, 1)), start_step=0, stop_step=3)
    batches = list(DataLoader(items, batch_sampler=sampler, collate_fn=collate))
    assert sorted(torch.cat([batch["id"] for batch in batches]).tolist()) == list(range(9))
    assert batches[0]["text"]["prompt_embeds"].shape == (3, 2, 3)
    assert batches[0]["prompt"] == [str(i) for i in batches[0]["id"].tolist()]


def test_impossible_orders():
    with pytest.raises(UserError, match="no samples to train on"):
        order([])
    with pytest.raises(UserError, match="train_batch_size is 0"):
        order([0], (0, 1, 1))
    with pytest.raises(ValueError, match="no micro-batch 1 on process 0"):
        order([0]).micro_batch(0, 1, 0)


def test_in_sequence_every_epoch_has_the_order_of_the_data() -> None:
    order = SampleOrder([0] * 7, seed=3, train_batch_size=2, sequential=True)
    assert [order.micro_batch(step, 0, 0) for step in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    shared = SampleOrder([0] * 8, seed=3, train_batch_size=2, world_size=2, sequential=True)
    assert shared.micro_batch(1, 0, 0) + shared.micro_batch(1, 0, 1) == [4, 5, 6, 7]
    buckets = SampleOrder([0, 1, 0, 1, 1, 0], seed=3, train_batch_size=2, sequential=True)
    assert [buckets.micro_batch(step, 0, 0) for step in range(2)] == [[0, 2], [1, 3]]


WEIGHTS = torch.tensor([4.0, 0.25, 0.25, 0.25, 4.0, 0.25, 0.25, 0.25, 0.25, 0.25])


def weighted(factors, buckets=(0,) * 10, seed=3, weights=WEIGHTS):
    size, accumulation, world = factors
    return SampleOrder(
        buckets,
        seed=seed,
        train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        world_size=world,
        weights=weights,
    )


@pytest.mark.parametrize("factors", FACTORS)
def test_weighted_draws_are_the_same_set_for_every_factorisation(factors):
    for step in range(12):
        expected = step_pairs(weighted((8, 1, 1)), step)
        assert Counter(step_pairs(weighted(factors), step)) == Counter(expected)


@pytest.mark.parametrize("buckets", [(0,) * 10, (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)])
def test_weighted_draws_follow_the_weights(buckets):
    drawn = Counter(sample for step in range(600) for sample in step_pairs(weighted((2, 2, 2), buckets), step))
    share = (drawn[0] + drawn[4]) / drawn.total()
    assert share == pytest.approx(0.8, abs=0.02)
    assert drawn[0] / drawn.total() == pytest.approx(0.4, abs=0.02) and min(drawn.values()) > 0


def test_a_weight_of_zero_is_never_drawn():
    which = weighted((4, 1, 1), weights=torch.tensor([1.0] * 9 + [0.0]))
    assert 9 not in {sample for step in range(100) for sample in step_pairs(which, step)}


def test_resumed_weighted_draws_go_on():
    whole = list(OrderSampler(weighted((2, 2, 2)), start_step=0, stop_step=11, rank=1))
    rest = list(OrderSampler(weighted((2, 2, 2)), start_step=7, stop_step=11, rank=1))
    assert rest == whole[14:]
