"""Tiny random diffusers pipelines, built on disk by the tests: the classes of the real ones, a few 10k parameters.

Pictures are 32x32 (VAE factor 2, latents 16x16), and every folder loads in plain diffusers. Weights are seeded; the
convolution that a UNet ends with is not zero, so that predictions differ between inputs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = (
    *("a", "and", "of", "on", "left", "right", "background", "small", "large"),
    *("circle", "square", "triangle", "diamond", "cross", "white", "gray", "black", "brown"),
    *("red", "green", "blue", "yellow", "purple", "cyan"),
)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level CLIP tokenizer of 77 places in which most words of the shapes world are few tokens."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens.append(pieces[0])
    tokens = [*dict.fromkeys([*tokens, "!", "<|startoftext|>", "<|endoftext|>"])]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def _text_config(tokenizer: CLIPTokenizer, width: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tiny_vae(**config: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **config,
    )


def _tiny_unet(**config: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )


def tiny_sd(folder: str | Path, prediction_type: str = "epsilon") -> Path:
    """Write a random Stable Diffusion pipeline (SD 2.1 with "v_prediction": linear projections, gelu)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        later = prediction_type == "v_prediction"
        tokenizer = tiny_tokenizer("!" if later else "<|endoftext|>")
        text_encoder = CLIPTextModel(_text_config(tokenizer, 16, "gelu" if later else "quick_gelu"))
        unet = _tiny_unet(cross_attention_dim=16, attention_head_dim=(2, 4), use_linear_projection=later)
        scheduler = DDIMScheduler(
            **BETAS, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
        pipeline = StableDiffusionPipeline(
            vae=_tiny_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_sdxl(folder: str | Path) -> Path:
    """Write a random SDXL pipeline: two text encoders of different width, ``text_time`` conditioning, float32 VAE."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer("!")
        text_encoder = CLIPTextModel(_text_config(tokenizer, 16, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer_2, 24, "gelu"))
        unet = _tiny_unet(
            cross_attention_dim=16 + 24,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=_tiny_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)
