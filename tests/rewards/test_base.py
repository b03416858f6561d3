from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import Reward, RewardError, RewardOutput
from diffalign.rewards.base import FunctionReward


class Red(Reward):
    """Mean of the red channel, plus the length of the prompt in details; remembers the batches it was given."""

    name = "red"
    differentiable = True

    def load(self) -> None:
        self.batches: list[int] = []
        self.weight = torch.nn.Linear(1, 1)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.batches.append(len(images))
        lengths = torch.tensor([[len(prompt), len(row)] for prompt, row in zip(prompts, metadata, strict=True)])
        return images[:, 0].mean((1, 2)), {"lengths": lengths}


class Seen(Reward):
    """Says what it was given, as PIL."""

    name = "seen"
    takes = "pil"
    uses_prompt = False

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        return torch.tensor([float(np.asarray(image)[0, 0, 0]) for image in images])


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def test_red_image() -> None:
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    output = Red()(red, ["x"])
    assert output.rewards.tolist() == [1.0]
    assert output.rewards.dtype == torch.float32
    assert output.valid.tolist() == [True] and output.messages == [None]


def test_scores_do_not_depend_on_batches_and_keep_their_order() -> None:
    batch = torch.stack(images(*[(5, 5)] * 7))
    prompts = [str(i) * i for i in range(7)]
    expected = batch[:, 0].mean((1, 2))
    for batch_size in (1, 2, 3, 32):
        output = Red(batch_size=batch_size)(batch, prompts)
        torch.testing.assert_close(output.rewards, expected)
        assert output.details["lengths"][:, 0].tolist() == list(range(7))
        assert output.details["lengths"].dtype == torch.float32
    backwards = Red(batch_size=3)(batch.flip(0), prompts[::-1])
    torch.testing.assert_close(backwards.rewards.flip(0), expected)


def test_mixed_sizes_are_scored_by_size_and_put_back() -> None:
    mixed = images((4, 4), (6, 4), (4, 4), (6, 4), (4, 4))
    reward = Red(batch_size=2)
    output = reward(mixed, "one for all", [{}, {"a": 1}, {}, {}, {}])
    assert output.rewards.tolist() == pytest.approx([image[0].mean().item() for image in mixed])
    assert output.details["lengths"][:, 1].tolist() == [0, 1, 0, 0, 0]
    assert reward.batches == [2, 1, 2]


def test_pictures_and_bytes_score_as_floats() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    expected = Red()(pixels.float() / 255, "x").rewards
    assert torch.equal(Red()(pixels, "x").rewards, expected)
    assert torch.equal(Red()(pictures, "x").rewards, expected)
    assert torch.equal(Red()([pictures[0].convert("RGBA"), pictures[1]], "x").rewards, expected)
    for form in (pixels, pixels.float() / 255, pictures):
        assert Seen()(form).rewards.tolist() == pixels[:, 0, 0, 0].tolist()


def test_no_images() -> None:
    for empty in (torch.zeros(0, 3, 8, 8), []):
        reward = Red()
        output = reward(empty, [])
        assert output.rewards.shape == output.valid.shape == (0,)
        assert output.rewards.dtype == torch.float32
        assert not hasattr(reward, "batches"), "a model was loaded for nothing"


def test_gradient_on_request_only() -> None:
    batch = torch.stack(images((4, 4), (4, 4))).requires_grad_()
    assert not Red()(batch, "x").rewards.requires_grad
    Red(batch_size=1)(batch, "x", grad=True).rewards.sum().backward()
    assert batch.grad is not None
    assert batch.grad[:, 0].mean().item() == pytest.approx(1 / 16) and batch.grad[:, 1:].abs().sum() == 0
    with pytest.raises(TypeError, match="seen is not differentiable"):
        Seen()(batch, grad=True)


def test_a_surrounding_autocast_does_not_reach_the_reward() -> None:
    class Product(Red):
        def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
            return (images.flatten(1) @ images.flatten(1).T).diagonal()

    batch = torch.stack(images((4, 4)))
    plain = Product()(batch, "x").rewards
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Product()(batch, "x").rewards, plain)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.rand(2, 3, 4, 4) * 2 - 1, r"\[-1, 1\], convert by images / 2 \+ 0.5"),
        (torch.rand(2, 3, 4, 4) * 255, "divide by 255"),
        (torch.full((2, 3, 4, 4), math.nan), "not finite"),
        (torch.rand(3, 4, 4), "add a dimension"),
        (torch.rand(2, 4, 4, 3), r"image 0 .* shape \(4, 4, 3\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "floats in"),
        (np.zeros((2, 3, 4, 4)), "numpy"),
        ([Image.new("RGB", (4, 4)), "file.png"], "image 1 .* str"),
        (Image.new("RGB", (4, 4)), "a list of PIL images"),
    ],
)
def test_wrong_images_are_named_before_a_model_is_loaded(given: Any, message: str) -> None:
    reward = Red()
    with pytest.raises(UserError, match=message):
        reward(given, "x")
    assert not hasattr(reward, "batches")


def test_wrong_numbers_are_named() -> None:
    batch = torch.stack(images((4, 4), (4, 4)))
    with pytest.raises(UserError, match="2 images but 3 prompts"):
        Red()(batch, ["a", "b", "c"])
    with pytest.raises(UserError, match="red needs the prompts"):
        Red()(batch)
    with pytest.raises(UserError, match="2 images but metadata of 1"):
        Red()(batch, "x", [{}])
    with pytest.raises(UserError, match="at least 1, got 0"):
        Red(batch_size=0)

    class Ocr(Red):
        required_metadata = ("ocr_text",)

    with pytest.raises(UserError, match="'ocr_text' in the metadata of image 1"):
        Ocr()(batch, "x", [{"ocr_text": "a"}, {}])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.tensor([1.0, math.nan]), "scored image 1 as nan"),
        (torch.tensor([math.inf, 1.0]), "scored image 0 as inf"),
        (torch.zeros(2, 1), r"shape \(2, 1\) for 2 images"),
        (torch.tensor(1.0), r"shape \(\)"),
        ([1.0, None], "image 1 as nan"),
        ("good", "are no scores"),
        ((torch.zeros(2), {"parts": torch.zeros(3)}), "'parts' for 3 of 2"),
    ],
)
def test_what_is_no_score_is_an_error_and_never_a_zero(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        FunctionReward(lambda images, prompts, metadata: returned, "mine")(torch.stack(images((4, 4), (4, 4))), "x")


def test_an_exception_of_a_reward_is_not_swallowed() -> None:
    def broken(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        FunctionReward(broken)(torch.stack(images((4, 4))), "x")


@pytest.mark.parametrize("form", [torch.as_tensor, np.asarray, list, lambda scores: (scores, {"twice": scores})])
def test_functions_may_return_what_they_like(form: Any) -> None:
    batch = torch.stack(images((4, 4), (4, 4)))
    reward = FunctionReward(lambda images, prompts, metadata: form([len(p) * 0.5 for p in prompts]))
    assert reward(batch, ["a", "bcd"]).rewards.tolist() == [0.5, 1.5]


def test_out_of_memory_halves_the_batch_and_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    class Small(Red):
        def score(
            self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            if len(images) > 2:
                raise torch.cuda.OutOfMemoryError("full")
            return super().score(images, prompts, metadata)

    batch = torch.stack(images(*[(4, 4)] * 7))
    reward = Small(batch_size=6)
    with caplog.at_level(logging.WARNING):
        output = reward(batch, "x")
    torch.testing.assert_close(output.rewards, batch[:, 0].mean((1, 2)))
    assert reward.batch_size == 2
    assert "batches of 3" in caplog.text and "batches of 2" in caplog.text


def test_unusual_means_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Typical(Red):
        typical = (0.4, 0.6)

    reward = Typical()
    with caplog.at_level(logging.WARNING):
        reward(torch.full((2, 3, 4, 4), 0.5), "x")
        assert not caplog.records
        reward(torch.zeros(2, 3, 4, 4), "x")
        reward(torch.zeros(2, 3, 4, 4), "x")
    assert len(caplog.records) == 1 and "usual range 0.4 to 0.6" in caplog.text


def test_models_are_let_go_and_loaded_again() -> None:
    reward = Red()
    first = reward(torch.stack(images((4, 4))), "x").rewards
    reward.close()
    assert not hasattr(reward, "weight")
    assert torch.equal(reward(torch.stack(images((4, 4))), "x").rewards, first)
    assert reward.to("cpu").device == torch.device("cpu")


class Rank(Reward):
    """Place of an image's mean within its group, 0 the darkest; remembers the groups it was given."""

    name = "rank"
    mode = "groupwise"
    uses_prompt = False

    def load(self) -> None:
        self.batches: list[list[int]] = []

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]], *, group_ids: list[int]
    ) -> Tensor:
        self.batches.append(group_ids)
        means, groups = images.mean((1, 2, 3)), torch.tensor(group_ids)
        return ((means[:, None] > means) & (groups[:, None] == groups)).sum(1)


def test_groups_stay_together_whatever_the_batch_size() -> None:
    batch = torch.stack(images(*[(4, 4)] * 9))
    groups = [5, 7, 5, 7, 7, 2, 5, 2, 7]
    expected = Rank(batch_size=32)(batch, group_ids=groups).rewards
    for batch_size, batches in ((1, [[5] * 3, [7] * 4, [2] * 2]), (6, [[5] * 3, [7] * 4 + [2] * 2])):
        reward = Rank(batch_size=batch_size)
        assert torch.equal(reward(batch, group_ids=torch.tensor(groups)).rewards, expected)
        assert reward.batches == batches
    order = torch.tensor([8, 5, 0, 1, 7, 3, 2, 4, 6])
    assert torch.equal(Rank()(batch[order], group_ids=[groups[i] for i in order]).rewards, expected[order])
    assert sorted(expected.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_wrong_groups_are_named() -> None:
    batch = torch.stack(images((4, 4), (4, 4)))
    with pytest.raises(UserError, match="rank compares the images of a group: give group_ids"):
        Rank()(batch)
    with pytest.raises(UserError, match="2 images but 1 group_ids"):
        Rank()(batch, group_ids=[0])
    with pytest.raises(UserError, match=r"group_ids\[1\] .* 0.5"):
        Rank()(batch, group_ids=[0, 0.5])  # type: ignore[list-item]
    with pytest.raises(UserError, match="group 3 .* several sizes"):
        Rank()(images((4, 4), (6, 4)), group_ids=[3, 3])
    assert Rank()(torch.zeros(0, 3, 4, 4), group_ids=[]).rewards.shape == (0,)


def test_an_image_that_cannot_be_scored_is_marked_with_its_reason() -> None:
    def partly(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> RewardOutput:
        good = torch.tensor([prompt != "bad" for prompt in prompts])
        return RewardOutput(torch.ones(len(images)), valid=good, messages=[None if ok else "no text" for ok in good])

    prompts = ["a", "bad", "b", "bad", "c"]
    output = FunctionReward(partly, batch_size=2)(torch.stack(images(*[(4, 4)] * 5)), prompts)
    assert output.valid.tolist() == [True, False, True, False, True]
    assert output.messages == [None, "no text", None, "no text", None]
    assert output.rewards.isnan().tolist() == [False, True, False, True, False]


def test_the_type_of_weights_may_be_named() -> None:
    assert Red(dtype="bf16").dtype == Red(dtype="bfloat16").dtype == torch.bfloat16
    assert Red(dtype="fp32").identity == Red().identity != Red(dtype="fp16").identity
    with pytest.raises(UserError, match="dtype of the reward red is 'bf61'. Did you mean 'bf16'"):
        Red(dtype="bf61")


def test_models_go_to_the_cpu_between_calls_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    monkeypatch.setattr(Reward, "_move_models", lambda self, device: moves.append(device.type))
    batch = torch.stack(images((4, 4)))
    reward = Red(offload="cpu_between_calls")
    reward.device = torch.device("cpu")
    for _ in range(2):
        reward(batch, "x")
    assert len(moves) == 3  # away; back and away
    reward(batch.requires_grad_(), "x", grad=True)
    assert len(moves) == 4, "a backward pass needs the models where they are"
    moves.clear()
    Red()(batch, "x")
    assert not moves
    with pytest.raises(UserError, match="Did you mean 'cpu_between_calls'"):
        Red(offload="cpu_between_cals")  # type: ignore[arg-type]


def test_identity_is_of_name_version_options_weights_and_code(tmp_path: Path) -> None:
    class Model(Red):
        def __init__(self, checkpoint: str = "owner/name", gain: float = 1.0, **options: Any) -> None:
            super().__init__(**options)
            self.checkpoint, self.gain = checkpoint, gain

    class Newer(Model):
        version = "2"

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    base = Model().identity
    assert (
        base.startswith("red/1/") and Model(device="cpu", batch_size=3, offload="cpu_between_calls").identity == base
    )
    at_home = Model(str(tmp_path)).identity
    others = [base, Newer().identity, Model(gain=2.0).identity, Model("owner/other").identity, at_home]
    file.write_bytes(b"better!")
    assert len({*others, Model(str(tmp_path)).identity, Model(dtype="bf16").identity}) == 7
    file.write_bytes(b"weights")
    assert Model(checkpoint=str(tmp_path)).identity == at_home


def test_what_has_a_state_of_its_own_is_equal_to_nothing_else() -> None:
    class Scorer:
        def __call__(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
            return images.mean((1, 2, 3))

    scorer = Scorer()
    reward = FunctionReward(scorer)
    assert reward.identity == reward.identity != FunctionReward(scorer).identity
    partial = functools.partial(scaled, gain=2)
    assert FunctionReward(partial, "f").identity == FunctionReward(functools.partial(scaled, gain=2), "f").identity
    assert FunctionReward(partial, "f").identity != FunctionReward(functools.partial(scaled, gain=3), "f").identity


def scaled(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]], gain: float = 1) -> Tensor:
    return gain * images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2, device="meta"), "runs on cpu but returned scores on meta"),
        (RewardOutput(torch.zeros(2), valid=torch.ones(3, dtype=torch.bool)), r"\(3,\) marks of validity"),
        (RewardOutput(torch.zeros(2), messages=["a"]), "1 messages for 2 images"),
    ],
)
def test_other_devices_and_marks_are_errors(returned: Any, message: str) -> None:
    reward = FunctionReward(lambda images, prompts, metadata: returned, "mine", device="cpu")
    with pytest.raises(RewardError, match=message):
        reward(torch.stack(images((4, 4), (4, 4))), "x")


def test_prompts_and_metadata_must_be_what_they_are_called() -> None:
    batch = torch.stack(images((4, 4), (4, 4)))
    with pytest.raises(UserError, match="prompt 1 for the reward red is a int, not a text: 3"):
        Red()(batch, ["a", 3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="metadata of image 0 for the reward red is a str"):
        Red()(batch, "x", ["a", "b"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="neither 0 to 255 nor -1 to 1"):
        Red()(batch * 6 - 3, "x")
