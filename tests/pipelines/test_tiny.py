"""The tiny pipelines are real ones: plain diffusers loads and samples them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline


def test_plain_diffusers_samples_them(tiny_sd_path, tiny_sd_v_path, tiny_sdxl_path):
    for path, kind in (
        (tiny_sd_path, StableDiffusionPipeline),
        (tiny_sd_v_path, StableDiffusionPipeline),
        (tiny_sdxl_path, StableDiffusionXLPipeline),
    ):
        pipe = DiffusionPipeline.from_pretrained(path)
        assert type(pipe) is kind
        pipe.set_progress_bar_config(disable=True)
        draws = [
            pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
            for prompt in ("a red circle on a gray background", "a small blue square")
        ]
        assert draws[0].shape == (1, 32, 32, 3)
        assert np.isfinite(draws[0]).all() and draws[0].std() > 0.01
        assert np.abs(draws[0] - draws[1]).max() > 0
        assert sum(p.numel() for p in pipe.unet.parameters()) < 150_000


def test_tokenizer_keeps_a_caption_short(tiny_sdxl_path):
    pipe = DiffusionPipeline.from_pretrained(tiny_sdxl_path, unet=None, vae=None, text_encoder=None)
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tokenizer("a large red circle left of a small blue square on a gray background").input_ids
        assert len(ids) < 40
        assert tokenizer.model_max_length == 77
        assert "red circle" in tokenizer.decode(ids, skip_special_tokens=True)
