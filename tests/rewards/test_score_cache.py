from __future__ import annotations

import math
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import CachedReward, Reward, RewardOutput, ScoreCache
from diffalign.rewards.base import FunctionReward


class Counting(Reward):
    """Mean of the red channel times a gain; counts the images it was given. The prompt "bad" has no score."""

    name = "counting"
    differentiable = True

    def __init__(self, gain: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.gain = gain
        self.seen = 0

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> RewardOutput:
        self.seen += len(images)
        scores = self.gain * images[:, 0].mean((1, 2))
        valid = torch.tensor([prompt != "bad" for prompt in prompts])
        return RewardOutput(
            scores, {"two": torch.stack([scores, -scores], 1)}, valid, [None if v else "no" for v in valid]
        )


class Grouped(Counting):
    """How far above its group's mean."""

    name = "grouped"
    mode = "groupwise"

    def score(self, images: Tensor, prompts: Any, metadata: Any, *, group_ids: list[int]) -> Tensor:  # type: ignore[override]
        self.seen += len(images)
        means = images.mean((1, 2, 3))
        ids = torch.tensor(group_ids)
        return torch.stack([mean - means[ids == group].mean() for mean, group in zip(means, ids, strict=True)])


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_an_image_is_scored_once_and_equal_to_the_last_bit(tmp_path: Path) -> None:
    first = CachedReward(Counting(), ScoreCache(tmp_path))
    whole = first(images(5), [f"p{i}" for i in range(5)])
    again = CachedReward(Counting(), ScoreCache(tmp_path / "."))
    output = again(images(5).flip(0), [f"p{i}" for i in range(5)][::-1])
    assert torch.equal(output.rewards.flip(0), whole.rewards) and torch.equal(
        output.details["two"].flip(0), whole.details["two"]
    )
    assert again.reward.seen == 0 and again.cache.hits["counting"] == 5 and again.cache.misses["counting"] == 0  # type: ignore[attr-defined]
    assert len(again.cache) == 5
    assert output.valid.all() and output.messages == [None] * 5
    assert again.identity == Counting().identity and again.differentiable


def test_what_changes_a_score_is_not_found(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    reward = CachedReward(Counting(), cache)
    reward(images(1), "x", [{"a": 1}])
    for form, prompt, row, other in (
        (images(1) * 0.5, "x", {"a": 1}, Counting()),
        (images(1), "y", {"a": 1}, Counting()),
        (images(1), "x", {"a": 2}, Counting()),
        (images(1), "x", {"a": 1}, Counting(gain=2.0)),
        (images(1), "x", {"a": 1}, Counting(dtype=torch.bfloat16)),
    ):
        before = cache.misses["counting"]
        expected = other(form, prompt).rewards
        assert torch.equal(CachedReward(other, cache)(form, prompt, [row]).rewards, expected)
        assert cache.misses["counting"] == before + 1
    for other in (Counting(batch_size=1), Counting(gain=1.0, device="cpu"), Counting(offload="cpu_between_calls")):
        if other._arguments[1].get("gain") is None:
            assert CachedReward(other, cache)(images(1), "x", [{"a": 1}]).valid.all() and other.seen == 0


def test_prompts_count_only_for_rewards_that_read_them(tmp_path: Path) -> None:
    reward = Counting()
    reward.uses_prompt = False
    cached = CachedReward(reward, ScoreCache(tmp_path))
    assert torch.equal(cached(images(1), "x").rewards, cached(images(1)).rewards)
    assert reward.seen == 1


def test_pictures_and_their_bytes_share_a_score(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    cached = CachedReward(Counting(), ScoreCache(tmp_path))
    assert torch.equal(cached(pixels, "x").rewards, cached(pictures, "x").rewards)
    assert cached.cache.hits["counting"] == 2
    turned = pixels.reshape(2, 3, 4, 5)
    cached(turned, "x")
    assert cached.cache.hits["counting"] == 2


def test_partial_hits_doubles_and_failures(tmp_path: Path) -> None:
    reward = Counting()
    cached = CachedReward(reward, ScoreCache(tmp_path))
    batch = images(4)
    cached(batch[1:2], "x")
    order = torch.tensor([0, 1, 0, 2, 3])
    output = cached(batch[order], ["x", "x", "x", "x", "bad"])
    assert reward.seen == 1 + 3, "an equal image was scored twice"
    assert output.valid.tolist() == [True] * 4 + [False] and output.messages[4] == "no"
    assert math.isnan(output.rewards[4].item()) and output.details["two"][4].isnan().all()
    assert torch.equal(output.rewards[:4], batch[order[:4], 0].mean((1, 2)))
    cached(batch[3:], "bad")
    assert reward.seen == 5, "a failure was kept"


def test_a_gradient_is_never_taken_from_the_cache(tmp_path: Path) -> None:
    cached = CachedReward(Counting(), ScoreCache(tmp_path))
    batch = images(2)
    cached(batch, "x")
    batch = batch.requires_grad_()
    cached(batch, "x", grad=True).rewards.sum().backward()
    assert batch.grad is not None and batch.grad[:, 0].mean().item() == pytest.approx(1 / 16)
    assert cached.reward.seen == 4 and not cached.cache.hits["counting"]  # type: ignore[attr-defined]


def test_a_groups_other_images_are_part_of_the_key(tmp_path: Path) -> None:
    cached = CachedReward(Grouped(), ScoreCache(tmp_path))
    batch = images(4)
    first = cached(batch, "x", group_ids=[0, 0, 1, 1])
    assert torch.equal(cached(batch[[2, 3]], "x", group_ids=[7, 7]).rewards, first.rewards[2:])
    assert cached.cache.hits["grouped"] == 2
    cached(batch[[1, 3]], "x", group_ids=[7, 7])
    assert cached.cache.misses["grouped"] == 6


def test_wrong_calls_are_noticed_with_a_full_cache_too(tmp_path: Path) -> None:
    cached = CachedReward(Counting(), ScoreCache(tmp_path))
    cached(images(2), "x")
    with pytest.raises(UserError, match="2 images but 1 prompts"):
        cached(images(2), ["x"])
    with pytest.raises(UserError, match="needs the prompts"):
        cached(images(2))
    with pytest.raises(UserError, match="divide by 255"):
        cached(images(2) * 255, "x")
    assert cached(images(0), []).rewards.shape == (0,)


def test_functions_of_one_file_are_told_apart(tmp_path: Path) -> None:
    def scaled(gain: float) -> Any:
        return lambda images, prompts, metadata: gain * images.mean((1, 2, 3))

    cache = ScoreCache(tmp_path)
    values = [
        CachedReward(FunctionReward(scaled(gain), "f"), cache)(images(1), "x").rewards.item() for gain in (1, 2, 1)
    ]
    assert values[1] == pytest.approx(2 * values[0]) and values[2] == values[0]
    assert cache.hits["f"] == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.path.write_bytes(b"not a database at all, but long enough to be looked at" * 10)
    with pytest.raises(UserError, match=r"scores.sqlite3 cannot be used: .* delete it"):
        cache.get(["a"])


def _fill(folder: Path, start: int) -> None:
    cache = ScoreCache(folder)
    for number in range(start, start + 20):
        cache.put("s", {str(number): {"reward": number, "details": {}}})


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, start)) for start in (0, 10, 1000)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(ScoreCache(tmp_path)) == 50


def test_a_killed_process_leaves_whole_scores(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=_fill, args=(tmp_path, 0))
    worker.start()
    while not (tmp_path / "scores.sqlite3").exists() or not len(ScoreCache(tmp_path)):
        pass
    worker.kill()
    worker.join()
    cache = ScoreCache(tmp_path)
    count = len(cache)
    assert 0 < count <= 20
    assert cache.get([str(n) for n in range(count)]) == {str(n): {"reward": n, "details": {}} for n in range(count)}
