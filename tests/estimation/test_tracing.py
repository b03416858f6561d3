"""Costs of the real architectures, against what is known of them."""

from __future__ import annotations

import pytest
import torch

from diffalign.errors import UserError
from diffalign.estimation.tracing import networks, trace
from diffalign.estimation.work import Model, Pass
from diffalign.pipelines.lora import lora_parameters
from diffalign.pipelines.skeleton import find_configs

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
G = 2**30


def sdxl(**changes: object) -> Model:
    return Model(SDXL, dtype=torch.bfloat16, autocast=torch.bfloat16, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "tflop"), [(1024, 6.76), (768, 3.64), (512, 1.59)])
def test_sdxl_costs_what_is_counted_by_hand(side: int, tflop: float) -> None:
    cost = trace(sdxl(height=side, width=side), Pass("", "denoiser", 1, adapters=False))
    assert cost.flops / 1e12 == pytest.approx(tflop, abs=0.005)
    assert cost.saved < 100, "nothing but the loss"


def test_the_networks_have_the_published_sizes() -> None:
    found = networks(sdxl())
    count = {part: found.frozen_bytes(part) / 2 for part in ("denoiser", "text_encoders")}
    assert count["denoiser"] == 2_567_463_684
    # Position ids, a buffer, come on top of the parameters.
    assert count["text_encoders"] == pytest.approx(123_060_480 + 694_659_840, rel=1e-5)
    assert found.frozen_bytes("vae") / 4 == 83_653_863, "in float32, in which it does not overflow"
    # 1.4515 M for each unit of rank, as for every LoRA on the attention of SDXL.
    assert found.trained == 16 * 1_451_520


def test_the_vae_of_1024_pixels() -> None:
    decode = trace(sdxl(), Pass("", "vae_decoder", 1, autocast=False))
    encode = trace(sdxl(), Pass("", "vae_encoder", 1, autocast=False))
    assert decode.flops / 1e12 == pytest.approx(10.5, abs=0.1)
    assert encode.flops / 1e12 == pytest.approx(4.9, abs=0.1)


def test_checkpointing_trades_memory_for_one_more_forward_pass() -> None:
    side = {"height": 512, "width": 512}
    one = Pass("", "denoiser", 1, grad=True)
    plain, some, all_ = (
        trace(sdxl(**side, checkpointed=blocks), one) for blocks in (None, ("down_blocks.2", "mid_block"), ())
    )
    assert all_.peak < some.peak < plain.peak and all_.peak < 0.2 * plain.peak
    assert plain.flops < some.flops < all_.flops
    forward = trace(sdxl(**side), Pass("", "denoiser", 1)).flops
    # Recomputation ends with the last tensor of a block that the backward pass needs, so it is less than all.
    assert 0.6 * forward < all_.flops - plain.flops < forward
    # The backward pass of a LoRA has no gradients of frozen weights: one forward, and attention's own recomputation.
    assert 1.9 * forward < plain.flops < 2.2 * forward


def test_memory_grows_with_the_batch_and_work_too() -> None:
    one, two = (trace(sdxl(height=512, width=512), Pass("", "denoiser", n, grad=True)) for n in (1, 2))
    assert two.saved == pytest.approx(2 * one.saved, rel=0.02)
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)


def test_the_lora_is_that_of_a_run(tiny_sdxl_path: str) -> None:
    from diffalign.pipelines import LoraSpec, add_lora, load_family

    family = load_family(tiny_sdxl_path)
    add_lora(family.denoiser, LoraSpec(rank=4), targets=family.lora_targets)
    real = sum(p.numel() for p in lora_parameters(family.denoiser).values())
    assert networks(Model(tiny_sdxl_path, rank=4)).trained == real


def test_text_encoders_that_train() -> None:
    model = Model("shapes-sdxl", text_encoders=True)
    cost = trace(model, Pass("", "text_encoders", 4, grad=True))
    assert cost.saved > 0 and networks(model).trained > networks(Model("shapes-sdxl")).trained


def test_a_model_that_is_not_here_says_what_to_do() -> None:
    with pytest.raises(UserError, match="--like sdxl"):
        find_configs("somebody/some-fine-tune")
    assert find_configs("somebody/some-fine-tune", like="sdxl").folder.endswith("sdxl")
    with pytest.raises(UserError, match="sdxl, sd15"):
        find_configs("x", like="sd3")
