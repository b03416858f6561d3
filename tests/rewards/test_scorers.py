"""What holds for every scorer on a CLIP-like model, on tiny checkpoints of its published layout."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import Reward, load_reward

# As CLIP_SCORERS of conftest.py, which cannot be imported.
NAMES = ("pickscore", "hpsv2", "hpsv2.1", "aesthetic", "clipscore", "clipscore:siglip", "clipscore:open_clip")
PROMPTS = ["a red circle", "a blue square on a gray background", "a cross", "a small green diamond"]


def noise(count: int, *size: int) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reward(name: str, tiny_reward: Callable[..., Reward]) -> Reward:
    return tiny_reward(name)


def spread(scores: Tensor) -> float:
    """The largest difference of scores: what an error is to be compared with."""
    return float(scores.max() - scores.min())


def test_gradient_agrees_with_finite_differences_in_float64(name: str, tiny_reward: Callable[..., Reward]) -> None:
    reward: Any = tiny_reward(name, dtype=torch.float64)
    reward.prepare()

    def score(images: Tensor) -> Tensor:
        with torch.enable_grad():
            result = reward.score(images, PROMPTS[:2], [{}, {}])
        return result[0] if isinstance(result, tuple) else result

    for size in ((20, 31), (40, 30)):
        images = noise(2, *size).double().requires_grad_()
        assert score(images).dtype == torch.float64
        assert torch.autograd.gradcheck(score, images, fast_mode=True)
        (gradient,) = torch.autograd.grad(score(images).sum(), images)
        assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_gradient_reaches_no_weight(reward: Reward) -> None:
    images = noise(3, 40, 52).requires_grad_()
    reward(images, PROMPTS[:3], grad=True).rewards.sum().backward()
    assert images.grad is not None and torch.isfinite(images.grad).all()
    modules = [value for value in vars(reward).values() if isinstance(value, torch.nn.Module)]
    assert modules and not any(module.training for module in modules)
    assert all(weight.grad is None for module in modules for weight in module.parameters())


def test_scores_do_not_depend_on_batch_order_or_neighbours(name: str, tiny_reward: Callable[..., Reward]) -> None:
    images = noise(4, 30, 44)
    together = tiny_reward(name)(images, PROMPTS).rewards
    assert together.shape == (4,) and together.dtype == torch.float32 and spread(together) > 0
    limit = {"atol": 1e-5 * max(1.0, spread(together)), "rtol": 1e-5}
    torch.testing.assert_close(tiny_reward(name, batch_size=1)(images, PROMPTS).rewards, together, **limit)
    torch.testing.assert_close(tiny_reward(name, batch_size=3)(images, PROMPTS).rewards, together, **limit)
    backwards = tiny_reward(name)(images.flip(0), PROMPTS[::-1]).rewards
    torch.testing.assert_close(backwards.flip(0), together, **limit)


def test_half_precision_of_the_towers_changes_little(name: str, tiny_reward: Callable[..., Reward]) -> None:
    images = noise(4, 28, 28)
    full = tiny_reward(name)(images, PROMPTS)
    half = tiny_reward(name, dtype=torch.bfloat16)(images, PROMPTS)
    assert half.rewards.dtype == torch.float32
    whole = full.rewards.abs().max()
    if "cosine" in full.details:  # of unit vectors: 2 percent of the largest that it could be
        whole = (full.rewards / full.details["cosine"]).abs().max()
    assert (half.rewards - full.rewards).abs().max() < 0.02 * whole
    # A dot product in bfloat16 would leave 8 bits.
    assert not torch.equal(half.rewards.bfloat16().float(), half.rewards)


def test_pictures_and_tensors_score_alike(reward: Reward) -> None:
    from PIL import Image

    pixels = (noise(2, 36, 50) * 255).round().byte()
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    assert torch.equal(reward(pictures, PROMPTS[:2]).rewards, reward(pixels, PROMPTS[:2]).rewards)
    assert torch.equal(reward(pixels, PROMPTS[:2]).rewards, reward(pixels, PROMPTS[:2]).rewards)


def test_long_prompts_are_cut_and_said(reward: Reward, caplog: pytest.LogCaptureFixture) -> None:
    if not reward.uses_prompt:
        return
    long = " ".join(["red circle"] * 60)
    cut = reward(noise(2, 28, 28), [long, PROMPTS[0]]).rewards
    assert [r.message for r in caplog.records if "were cut" in r.message][0].startswith(f"{reward.name}: 1 of 2 ")
    torch.testing.assert_close(reward(noise(2, 28, 28), [long + " red", PROMPTS[0]]).rewards, cut)


def test_it_comes_back_after_close_and_offload(name: str, tiny_reward: Callable[..., Reward]) -> None:
    reward = tiny_reward(name, offload="cpu_between_calls")
    first = reward(noise(2, 28, 28), PROMPTS[:2]).rewards
    reward.close()
    assert torch.equal(reward(noise(2, 28, 28), PROMPTS[:2]).rewards, first)


def test_identity_is_of_the_weights(name: str, tiny_reward: Callable[..., Reward]) -> None:
    assert tiny_reward(name).identity == tiny_reward(name, batch_size=2).identity
    others = {tiny_reward(other).identity for other in NAMES if other != name}
    assert tiny_reward(name).identity not in others


@pytest.mark.parametrize("published", ["pickscore", "hpsv2", "hpsv2.1", "aesthetic", "clipscore"])
def test_nothing_is_downloaded_unless_it_may(published: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    reward = load_reward(published, device="cpu", local_files_only=True)
    assert reward.card(published).memory_gb and reward.licence and reward.hacks and reward.typical
    with pytest.raises(UserError, match=r"hf download"):
        reward(noise(1, 28, 28), "a cross")
