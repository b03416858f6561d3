"""What holds for every reward, whatever it is.

A reward joins by a line in REWARDS (what ``load_reward`` takes), or by a name of the fixture ``tiny_reward`` in
conftest.py in TINY. Those with a test of their own for all of this are in ELSEWHERE.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import CachedReward, Reward, RewardError, RewardOutput, ScoreCache, load_reward, registry
from diffalign.rewards.failures import FailurePolicy, guarded


class Contrast(Reward):
    """Groupwise: how far an image is from its group's mean brightness."""

    name = "contrast"
    mode = "groupwise"

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]], *, group_ids: list[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        means, ids = images.mean((1, 2, 3)), torch.tensor(group_ids)
        away = torch.stack([mean - means[ids == group].mean() for mean, group in zip(means, ids, strict=True)])
        return away, {"mean": means}


def red(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of the red channel."""
    return images[:, 0].mean((1, 2)), {"parts": images.mean((2, 3))}


REWARDS: dict[str, Any] = {
    "function": red,
    "groupwise": Contrast,
    "jpeg_compressibility": "jpeg_compressibility",
    "jpeg_incompressibility": "jpeg_incompressibility",
    "shapes-aesthetic": "shapes-aesthetic",
    "shapes-annotator": "shapes-annotator",
    "shapes-checker": "shapes-checker",
    "shapes-clip": "shapes-clip",
    "cached": red,
}
TINY = ("pickscore", "hpsv2", "hpsv2.1", "aesthetic", "clipscore", "clipscore:siglip", "clipscore:open_clip")
ELSEWHERE = {"imagereward": "test_imagereward.py", "remote": "remote/", "trained": "test_trained.py"}

PROMPTS = ["a red circle on a gray background", "a blue square", "a green circle", "a yellow triangle", "a red square"]
GROUPS = [0, 1, 0, 1, 0]


@pytest.fixture(params=[*REWARDS, *TINY])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """``make(**options)`` gives the reward, on the CPU."""
    name = request.param
    if name in TINY:
        tiny = request.getfixturevalue("tiny_reward")
        return lambda **options: tiny(name, **options)
    if name == "cached":
        return lambda **options: CachedReward(load_reward(red, device="cpu", **options), ScoreCache(tmp_path))
    return lambda **options: load_reward(REWARDS[name], device="cpu", **options)


def pixels(count: int = 5, height: int = 64, width: int = 64) -> Tensor:
    """Pictures of 8 bits: soft blobs, so that resizing keeps something of them."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(height))
    return (torch.nn.functional.interpolate(noise, (height, width), mode="bilinear") * 255).round().byte()


def ask(reward: Reward, images: Any, indices: list[int] | None = None, **options: Any) -> RewardOutput:
    chosen = list(range(5)) if indices is None else indices
    return reward(images, [PROMPTS[i] for i in chosen], group_ids=[GROUPS[i] for i in chosen], **options)


def close_to(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4 * max(1.0, float(b.abs().max())), rtol=1e-4)


def test_one_float32_score_an_image_with_details_of_each(make: Any) -> None:
    output = ask(make(), pixels().float() / 255)
    assert output.rewards.shape == (5,) and output.rewards.dtype == torch.float32
    assert output.rewards.device.type == "cpu" and output.rewards.isfinite().all()
    assert output.valid.all() and output.messages == [None] * 5
    assert all(len(value) == 5 and value.dtype == torch.float32 for value in output.details.values())


def test_none_and_one(make: Any) -> None:
    reward = make()
    for empty in (torch.zeros(0, 3, 64, 64), []):
        output = reward(empty, [], group_ids=[])
        assert output.rewards.shape == output.valid.shape == (0,) and output.rewards.dtype == torch.float32
    assert ask(reward, pixels()[:1], [0]).rewards.shape == (1,)


def test_batches_order_and_repetition_do_not_matter(make: Any) -> None:
    reward, images = make(), pixels()
    whole = ask(reward, images)
    assert torch.equal(ask(reward, images).rewards, whole.rewards)
    order = [3, 0, 4, 2, 1]
    close_to(ask(reward, images[order], order).rewards, whole.rewards[order])
    for batch_size in (1, 2):
        reward.batch_size = batch_size
        close_to(ask(reward, images).rewards, whole.rewards)


def test_sizes_may_be_mixed(make: Any) -> None:
    reward = make()
    large, small = pixels(5, 72, 64), pixels(5, 64, 80)
    mixed = [large[0], small[1], large[2], small[3], large[4]]  # by groups
    scores = ask(reward, mixed).rewards
    close_to(scores[[0, 2, 4]], ask(reward, large[[0, 2, 4]], [0, 2, 4]).rewards)
    close_to(scores[[1, 3]], ask(reward, small[[1, 3]], [1, 3]).rewards)


def test_pictures_bytes_and_floats_score_alike(make: Any) -> None:
    reward, images = make(), pixels()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    expected = ask(reward, pictures).rewards
    close_to(ask(reward, images).rewards, expected)
    close_to(ask(reward, images.float() / 255).rewards, expected)


def test_wrong_ranges_and_numbers_are_named(make: Any) -> None:
    reward, images = make(), pixels().float() / 255
    with pytest.raises(UserError, match=r"from \[-1, 1\], convert by"):
        ask(reward, images * 2 - 1)
    with pytest.raises(UserError, match="divide by 255"):
        ask(reward, images * 255)
    with pytest.raises(UserError, match="5 images but 4 prompts"):
        reward(images, PROMPTS[:4], group_ids=GROUPS)
    if reward.uses_prompt:
        with pytest.raises(UserError, match="needs the prompts"):
            reward(images, group_ids=GROUPS)
    if not reward.differentiable:
        with pytest.raises(TypeError, match="is not differentiable"):
            ask(reward, images.requires_grad_(), grad=True)


def test_a_score_that_is_none_is_an_error_or_a_hole(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = make()
    inner = reward.reward if isinstance(reward, CachedReward) else reward

    def nothing(images: Any, prompts: list[str], metadata: Any, **options: Any) -> Tensor:
        return torch.tensor([math.nan if prompt == PROMPTS[3] else 1.0 for prompt in prompts])

    monkeypatch.setattr(inner, "score", nothing)
    with pytest.raises(RewardError, match="scored image 3 as nan"):
        ask(reward, pixels())
    output = guarded(reward, pixels(), PROMPTS, group_ids=GROUPS, policy=FailurePolicy("drop"))
    lost = [1, 3] if reward.mode == "groupwise" else [3]
    assert (~output.valid).nonzero().flatten().tolist() == lost
    assert output.rewards.isnan().nonzero().flatten().tolist() == lost


def test_a_model_that_was_let_go_or_moved_away_comes_back(make: Any) -> None:
    reward, images = make(), pixels()
    first = ask(reward, images).rewards
    reward.park()
    assert torch.equal(ask(reward, images).rewards, first)
    reward.offload = "cpu_between_calls"
    assert torch.equal(ask(reward, images).rewards, first) and torch.equal(ask(reward, images).rewards, first)
    reward.close()
    assert torch.equal(ask(reward, images).rewards, first)
    assert make(offload="cpu_between_calls").identity == reward.identity


def test_the_identity_is_of_the_scorer_not_of_where_it_runs(make: Any) -> None:
    reward = make()
    assert reward.identity.startswith(f"{reward.name}/{reward.version}/")
    assert make(batch_size=3).identity == reward.identity
    assert make(dtype=torch.bfloat16).identity != reward.identity
    before = reward.identity
    ask(reward, pixels())
    assert reward.identity == before


def test_every_built_in_reward_is_here() -> None:
    assert {*registry._BUILT_IN} <= {*REWARDS, *TINY, *ELSEWHERE}


def test_importing_opens_no_weights_and_no_socket() -> None:
    """All modules of rewards in a process that may not connect, nor read a weight file."""
    code = """
import importlib, sys
from pathlib import Path
def watch(event, args):
    if event in ("socket.connect", "socket.bind"):
        raise SystemExit(f"{event} {args}")
    if event == "open" and str(args[0]).endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise SystemExit(f"opened {args[0]}")
sys.addaudithook(watch)
import diffalign.rewards
root = Path(diffalign.rewards.__file__).parent
for file in sorted(root.rglob("*.py")):
    importlib.import_module("diffalign.rewards." + ".".join(file.relative_to(root).with_suffix("").parts))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
