from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.draw import is_flat, sample_images, warn_of_flat

PROMPTS = ["a red circle", "a blue square on a gray background", "a cross", "a small green diamond", "a triangle"]
SEEDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def pipe(tiny_sdxl_path: str) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(tiny_sdxl_path)


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_an_image_is_what_plain_diffusers_draws_for_its_seed(pipe: DiffusionPipeline) -> None:
    ours = sample_images(pipe, PROMPTS[:2], SEEDS[:2], num_inference_steps=4, guidance_scale=3.0, batch_size=1)
    for prompt, seed, image in zip(PROMPTS, SEEDS, ours, strict=False):
        generator = torch.Generator("cpu").manual_seed(seed)
        theirs = pipe(prompt, generator=generator, num_inference_steps=4, guidance_scale=3.0).images[0]
        assert np.array_equal(np.asarray(image), np.asarray(theirs))


def test_an_image_does_not_depend_on_its_batch(pipe: DiffusionPipeline) -> None:
    alone = arrays(sample_images(pipe, PROMPTS, SEEDS, num_inference_steps=8, batch_size=1))
    for batch_size in (2, 3, 5):
        batched = arrays(sample_images(pipe, PROMPTS, SEEDS, num_inference_steps=8, batch_size=batch_size))
        # Arithmetic in batches of another size rounds differently: one level of 255, in few places.
        assert np.abs(batched - alone).max() <= 1
        assert (batched != alone).mean() < 1e-3
    backwards = arrays(sample_images(pipe, PROMPTS[::-1], SEEDS[::-1], num_inference_steps=8, batch_size=1))
    assert np.array_equal(backwards[::-1], alone)


def test_prompt_and_seed_both_matter(pipe: DiffusionPipeline) -> None:
    images = arrays(sample_images(pipe, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [0, 1, 0], num_inference_steps=2))
    assert np.abs(images[0] - images[1]).max() > 20
    assert np.abs(images[0] - images[2]).max() > 0


def test_modes_bar_and_global_randomness_are_left_as_they_were(tiny_sdxl_path: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_sdxl_path)
    pipe.set_progress_bar_config(desc="mine")
    plain = arrays(sample_images(pipe, PROMPTS[:1], [0], num_inference_steps=2))
    lora = LoraConfig(r=2, lora_alpha=2, lora_dropout=0.5, target_modules=["to_q"], init_lora_weights="gaussian")
    pipe.unet.add_adapter(lora)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    pipe.unet.train()
    pipe.unet.conv_in.eval()
    state = torch.get_rng_state()
    first = arrays(sample_images(pipe, PROMPTS[:1], [0], num_inference_steps=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.unet.training and pipe.unet.down_blocks[1].training and not pipe.unet.conv_in.training
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert np.array_equal(first, arrays(sample_images(pipe, PROMPTS[:1], [0], num_inference_steps=2)))
    assert not np.array_equal(first, plain)


def test_size_and_negative_prompt_reach_the_pipeline(pipe: DiffusionPipeline) -> None:
    images = sample_images(pipe, PROMPTS[:1], [0], num_inference_steps=2, height=16, width=24)
    assert images[0].size == (24, 16)
    plain = arrays(sample_images(pipe, PROMPTS[:1], [0], num_inference_steps=2))
    other = arrays(sample_images(pipe, PROMPTS[:1], [0], num_inference_steps=2, negative_prompt="a black cross"))
    assert not np.array_equal(plain, other)


def test_nothing_to_draw(pipe: DiffusionPipeline) -> None:
    assert sample_images(pipe, [], []) == []


def test_bad_settings(pipe: DiffusionPipeline) -> None:
    with pytest.raises(UserError, match="2 prompts but 1 seeds"):
        sample_images(pipe, PROMPTS[:2], [0])
    with pytest.raises(UserError, match="at least 1, got 0 and 30"):
        sample_images(pipe, PROMPTS[:1], [0], batch_size=0)


def test_flat_images_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.new("RGB", (8, 8))
    assert is_flat(picture)
    picture.putpixel((3, 3), (0, 1, 0))
    assert not is_flat(picture)
    with caplog.at_level(logging.WARNING):
        warn_of_flat(0, 9)
        assert not caplog.records
        warn_of_flat(2, 9)
    assert "2 of 9 images are one flat colour" in caplog.text
