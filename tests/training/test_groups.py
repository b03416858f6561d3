"""Which images a rollout holds: the same ones for every number of processes, and sizes that fit or say how to."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
import torch

from diffalign.errors import UserError
from diffalign.training.groups import Arithmetic, GroupOrder, trained_steps

SIZES = Arithmetic(groups=4, images_per_group=3, updates=2, epochs=1, micro_batch=3, passes_per_image=5, world_size=1)


def test_the_arithmetic_of_a_rollout() -> None:
    assert (SIZES.images, SIZES.images_per_step, SIZES.steps_per_rollout) == (12, 6, 2)
    assert SIZES.micro_batches == 10
    assert replace(SIZES, world_size=2).micro_batches == 5
    SIZES.check()


def test_prompts_that_do_not_go_into_the_updates_are_refused_with_the_nearest_number_that_does() -> None:
    with pytest.raises(UserError, match="use num_prompts_per_rollout 6"):
        replace(SIZES, groups=5).check()


def fits(sizes: Arithmetic) -> bool:
    try:
        sizes.check()
    except UserError:
        return False
    return True


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("images_per_group", [2, 3, 8])
def test_what_is_said_in_place_of_sizes_that_do_not_fit_does_and_is_nearest(
    world_size: int, images_per_group: int
) -> None:
    refused = 0
    for groups, updates, micro_batch in product(range(1, 14), (1, 2, 3), (1, 4, 6)):
        wrong = replace(
            SIZES,
            groups=groups,
            images_per_group=images_per_group,
            updates=updates,
            micro_batch=micro_batch,
            world_size=world_size,
        )
        if fits(wrong):
            continue
        refused += 1
        with pytest.raises(UserError) as error:
            wrong.check()
        numbers = {name: int(value) for name, value in re.findall(r"[Uu]se (num_\w+) (\d+)", str(error.value))}
        near = numbers["num_prompts_per_rollout"]
        assert fits(replace(wrong, groups=near))
        off = abs(near - groups)
        assert not any(fits(replace(wrong, groups=g)) for g in range(max(1, groups - off + 1), groups + off))
        for batch in map(int, re.findall(r"or train_batch_size (\d+)", str(error.value))):
            assert fits(replace(wrong, micro_batch=batch))
    assert refused


@pytest.mark.parametrize("rollout", [0, 3])
def test_processes_draw_the_images_of_one_process_and_train_on_them_in_the_same_step(rollout: int) -> None:
    def shares(world_size: int) -> list[set[tuple[int, int, int]]]:
        order = GroupOrder(10, 7, replace(SIZES, world_size=world_size))
        drawn = [order.draws(rollout, rank) for rank in range(world_size)]
        return [
            {
                (int(d.prompts[i]), int(d.groups[i]), int(d.seeds[i]))
                for d in drawn
                for i in order.share(d, update).tolist()
            }
            for update in range(SIZES.updates)
        ]

    one = shares(1)
    assert shares(2) == one
    assert all(len(share) == SIZES.images_per_step for share in one)
    assert not one[0] & one[1]


def test_each_pass_takes_every_prompt_once_and_images_never_repeat() -> None:
    order = GroupOrder(4, 0, SIZES)
    first, second = (order.draws(n, 0) for n in (0, 1))
    assert sorted(first.prompts.unique().tolist()) == [0, 1, 2, 3]
    assert not set(first.seeds.tolist()) & set(second.seeds.tolist())
    assert torch.equal(order.draws(1, 0).seeds, second.seeds)
    assert first.place.tolist() == list(range(12))


def test_whole_groups_are_on_one_process_only_where_they_go_into_the_processes() -> None:
    assert SIZES.whole_groups()
    assert replace(SIZES, world_size=2).whole_groups()
    assert not replace(SIZES, world_size=3).whole_groups()


def test_steps_to_train_on() -> None:
    def reverse(n: int) -> torch.Tensor:
        return torch.arange(n).flip(0)

    assert trained_steps([0, 1, 3], None, reverse) == [0, 1, 3]
    assert trained_steps([0, 1, 3], 2, reverse) == [1, 3]
    assert trained_steps([0, 1], 5, reverse) == [0, 1]
