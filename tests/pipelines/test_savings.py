"""Parts that take less memory: what they give is the same, and what cannot be is said before anything loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffalign.errors import UserError
from diffalign.pipelines import load_family, savings
from diffalign.pipelines.base import Family


@pytest.fixture
def families(tiny_sdxl_path: str) -> tuple[Family, Family]:
    return load_family(tiny_sdxl_path), load_family(tiny_sdxl_path, offload_idle=True)


def test_idle_parts_give_what_they_gave(families: tuple[Family, Family]) -> None:
    plain, idle = families
    for name, value in plain.encode_prompts(["a cat"]).items():
        assert torch.equal(idle.encode_prompts(["a cat"])[name], value)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = plain.encode_images(images)
    assert torch.equal(idle.encode_images(images), latents)
    assert torch.equal(idle.decode_latents(latents), plain.decode_latents(latents))
    wanted = latents.requires_grad_()
    idle.decode_latents(wanted, grad=True).sum().backward()
    assert wanted.grad is not None and wanted.grad.abs().sum() > 0


def test_a_pipeline_draws_with_idle_parts(families: tuple[Family, Family]) -> None:
    drawn = []
    for family in families:
        generator = torch.Generator().manual_seed(0)
        pipe: Any = family.pipeline()
        drawn.append(pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(*drawn)


def test_an_idle_part_comes_when_it_is_called_and_goes_when_it_is_done(
    families: tuple[Family, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families[1]
    moves: list[tuple[str, str]] = []
    for name, module in {"vae": family.vae, **family.text_encoders}.items():
        original = module.to

        def to(where: Any, *, name: str = name, original: Any = original) -> Any:
            moves.append((name, str(where)))
            return original(where)

        monkeypatch.setattr(module, "to", to)
    family.encode_prompts(["a cat"])
    assert [name for name, where in moves if where == "cpu"] == ["text_encoder", "text_encoder_2"]
    moves.clear()
    latents = family.encode_images(torch.zeros(1, 3, 16, 16))
    family.decode_latents(latents)
    assert moves == [("vae", "cpu")] * 4
    moves.clear()
    family.decode_latents(latents, grad=True)
    assert moves == [("vae", "cpu")], "what a backward pass will need was sent away"


def test_quantisation_that_cannot_be_is_refused(tiny_sdxl_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_family(tiny_sdxl_path, quantize="4bit")
    monkeypatch.setattr(savings, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*diffalign\[gpu\]"):
        _ = family.denoiser
    monkeypatch.setattr(savings, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="needs a CUDA device"):
        _ = family.denoiser


def test_what_is_asked_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    asked = savings.quantized("4bit", torch.bfloat16, torch.device("cuda"))["quantization_config"]
    assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert savings.quantized("none", torch.bfloat16, torch.device("cpu")) == {}
