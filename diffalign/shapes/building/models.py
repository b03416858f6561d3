"""The architectures of the bundled models: real diffusers and transformers classes, small."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LATENT_CHANNELS = 8
TEXT_WIDTH = 64
TIME_ID_WIDTH = 16


def build_vae() -> AutoencoderKL:
    """KL autoencoder, 64x64 pixels to 8x8 latents of 8 channels.

    Two things differ from a default AutoencoderKL, because flat colours are all there is in this world. GroupNorm has
    one group: a group per channel would normalise the colour of a plain area away. And it starts near the identity
    (see :func:`_start_near_identity`): from the default start, half an hour on a CPU leaves colours wrong.
    """
    width = (8, 16, 32, 64)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(width),
        up_block_types=("UpDecoderBlock2D",) * len(width),
        block_out_channels=width,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    _start_near_identity(vae)
    return vae


def _start_near_identity(vae: AutoencoderKL) -> None:
    """Zero the residual branches and add an averaging identity to every other convolution but the last."""
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d) or name.endswith("conv1"):
            continue
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
        elif not name.endswith("conv_out"):
            identity = torch.zeros_like(module.weight)
            channels = torch.arange(min(module.weight.shape[:2]))
            if module.stride[0] == 2:
                identity[channels, channels, :2, :2] = 0.25
            else:
                middle = module.weight.shape[-1] // 2
                identity[channels, channels, middle, middle] = 1.0
            module.weight.data.mul_(0.3).add_(identity)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The two text encoders of an SDXL pipeline; the second one also gives the pooled embedding."""

    def config(hidden_act: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act=hidden_act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    return CLIPTextModel(config("quick_gelu")), CLIPTextModelWithProjection(config("gelu"))


def build_unet() -> UNet2DConditionModel:
    """SDXL's UNet in small: cross-attention at both levels, ``text_time`` conditioning on the six size numbers."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(56, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_ID_WIDTH,
    )


def build_scheduler() -> DDIMScheduler:
    """Linear betas and trailing spacing: plain backgrounds need a schedule that ends in pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )
