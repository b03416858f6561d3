"""Which images a rollout holds: the same ones for every number of processes, and sizes that fit or say how to."""

from __future__ import annotations

from dataclasses import replace

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
    with pytest.raises(UserError, match="use num_prompts_per_rollout 4"):
        replace(SIZES, groups=5).check()


def test_images_that_do_not_go_into_micro_batches_are_refused_with_what_would() -> None:
    wrong = replace(SIZES, micro_batch=4)
    with pytest.raises(UserError, match=r"num_prompts_per_rollout (\d+), or train_batch_size (\d+)") as error:
        wrong.check()
    prompts, batch = _numbers(str(error.value))
    replace(wrong, groups=prompts).check()
    replace(wrong, micro_batch=batch).check()


def _numbers(message: str) -> tuple[int, int]:
    tail = message.partition("Use num_prompts_per_rollout ")[2]
    prompts, _, rest = tail.partition(", or train_batch_size ")
    return int(prompts), int(rest.rstrip("."))


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
