"""Keyed randomness: the same key is the same number, whatever is drawn beside it."""

from __future__ import annotations

import numpy as np
import torch

from diffalign.diffusion.random import key_seed, keyed_noise, keyed_permutation, keyed_uniform


def test_a_draw_depends_on_its_key_alone() -> None:
    together = keyed_noise([(0, "noise", 3, "a"), (0, "noise", 3, "b")], (4, 2, 2))
    torch.manual_seed(123)
    alone = keyed_noise([(0, "noise", 3, "b")], (4, 2, 2))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_every_part_of_a_key_counts() -> None:
    keys = [(0, "noise", 3), (1, "noise", 3), (0, "timestep", 3), (0, "noise", 4), (0, "noise", "3"), (0, "noise")]
    assert len({key_seed(*key) for key in keys}) == len(keys)


def test_numpy_integers_are_integers() -> None:
    assert key_seed(np.int64(3), "x") == key_seed(3, "x")  # type: ignore[arg-type]


def test_the_values_never_change() -> None:
    """A change here changes every run that was ever made."""
    assert key_seed(0, "noise", 1, "pair") == 5522717327396726166


def test_noise_is_unit_gaussian_and_uniform_is_uniform() -> None:
    noise = keyed_noise([(0, i) for i in range(64)], (32, 32))
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    u = keyed_uniform([(0, i) for i in range(2000)])
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean().item() - 0.5) < 0.02


def test_permutation_is_one() -> None:
    order = keyed_permutation(100, 0, "order", 1)
    assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(order, keyed_permutation(100, 0, "order", 2))
