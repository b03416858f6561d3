"""What only a GPU can show of rewards: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``."""

from __future__ import annotations

import pytest
import torch

from diffalign.rewards import CachedReward, RewardError, ScoreCache, load_reward, load_rewards
from diffalign.rewards.base import FunctionReward


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_scores_are_where_the_images_are() -> None:
    reward = load_reward("shapes-clip", device="cuda")
    expected = load_reward("shapes-clip", device="cpu")(images(), "a red circle").rewards
    on_cpu, on_gpu = reward(images(), "a red circle").rewards, reward(images().cuda(), "a red circle").rewards
    assert on_cpu.device.type == "cpu" and on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_cpu, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(on_gpu.cpu(), expected, atol=1e-3, rtol=1e-4)


def test_an_offloaded_model_leaves_the_gpu() -> None:
    reward = load_reward("shapes-clip", device="cuda", offload="cpu_between_calls")
    first = reward(images(), "a red circle").rewards
    assert all(weight.device.type == "cpu" for weight in reward.model.parameters())
    assert torch.equal(reward(images(), "a red circle").rewards, first)
    batch = images().cuda().requires_grad_()
    reward(batch, "a red circle", grad=True).rewards.sum().backward()
    assert batch.grad is not None and batch.grad.abs().sum() > 0


def test_another_device_is_an_error() -> None:
    reward = FunctionReward(lambda images, prompts, metadata: torch.zeros(len(images)).cuda(), "mine", device="cpu")
    with pytest.raises(RewardError, match="runs on cpu but returned scores on cuda"):
        reward(images(), "x")


def test_sets_and_caches_on_the_gpu(tmp_path: object) -> None:
    rewards = load_rewards([{"reward": "shapes-clip", "transform": "zscore"}, "shapes-checker"], device="cuda")
    scores = rewards(images().cuda(), "a red circle on a gray background", group_ids=[0, 0, 0, 1, 1, 1])
    assert scores.total.device.type == "cuda" and scores.valid.all()
    assert scores.metrics(torch.tensor([0, 0, 0, 1, 1, 1], device="cuda"))["reward/flat_groups"] <= 1
    cached = CachedReward(load_reward("shapes-clip", device="cuda"), ScoreCache(str(tmp_path)))
    first = cached(images().cuda(), "a red circle").rewards
    assert torch.equal(cached(images(), "a red circle").rewards, first.cpu())
