"""Stable Diffusion XL: two text encoders, and conditioning on the size and crop of each image.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv 2307.01952;
the micro-conditioning is its section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.pipelines.base import Family
from diffalign.pipelines.files import load_config
from diffalign.pipelines.kohya import KohyaNames
from diffalign.pipelines.prompts import tokenize, warn_truncated


class StableDiffusionXL(Family):
    """Text is {"prompt_embeds": (B, L, D1 + D2), "pooled_prompt_embeds": (B, P)}.

    The embeddings are the penultimate hidden states of both encoders side by side; the pooled one is the projected
    output of the second.

    An empty prompt is *encoded*, as in the diffusers training scripts. The pipeline does otherwise for its negative
    prompt: if none is given and the checkpoint has ``force_zeros_for_empty_prompt`` (SDXL base has), it takes zeros;
    :meth:`encode_unconditional` does as the pipeline does.
    """

    name = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    encoder_classes: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    unused_parts = ("feature_extractor", "image_encoder")

    @property
    def kohya(self) -> KohyaNames:
        return KohyaNames(
            base_version="sdxl_base_v1-0",
            architecture="stable-diffusion-xl-v1-base",
            text={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
            original_unet=True,
        )

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self._denoiser_config
        # The UNet takes the pooled embedding and the six embedded sizes side by side.
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return {
            "prompt_embeds": (self.text_length, int(config["cross_attention_dim"])),
            "pooled_prompt_embeds": (int(pooled),),
        }

    def encode_prompts(self, prompts: Sequence[str], *, grad: bool = False, warn: bool = True) -> dict[str, Tensor]:
        hidden, cut, length = [], set(), 0
        with torch.set_grad_enabled(grad):
            for name, encoder in self.text_encoders.items():
                tokenizer = self.tokenizers[name]
                tokens, too_long = tokenize(tokenizer, prompts)
                cut.update(too_long)
                length = tokenizer.model_max_length
                output = encoder(tokens.ids.to(self.device), output_hidden_states=True)
                hidden.append(output.hidden_states[-2])
            pooled = output.text_embeds
        if warn:
            warn_truncated(prompts, sorted(cut), length)
        return {
            "prompt_embeds": torch.cat(hidden, dim=-1).to(self.dtype),
            "pooled_prompt_embeds": pooled.to(self.dtype),
        }

    def encode_unconditional(self) -> dict[str, Tensor]:
        text = super().encode_unconditional()
        zeros = load_config(DiffusionPipeline, self.folder, None).get("force_zeros_for_empty_prompt", True)
        return {name: torch.zeros_like(value) for name, value in text.items()} if zeros else text

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        text: Mapping[str, Tensor],
        sizes: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        batch, _, height, width = latents.shape
        if sizes is None:
            height, width = height * self._vae_factor, width * self._vae_factor
            sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(batch, 6)
        if sizes.shape != (batch, 6):
            raise ValueError(f"sizes must be ({batch}, 6), one row per image, but are {tuple(sizes.shape)}.")
        dtype, device = next(denoiser.parameters()).dtype, latents.device
        pred: Tensor = denoiser(
            latents.to(dtype),
            timesteps.to(device),
            encoder_hidden_states=text["prompt_embeds"].to(device, dtype),
            timestep_cond=None if timestep_cond is None else timestep_cond.to(device, dtype),
            added_cond_kwargs={
                "text_embeds": text["pooled_prompt_embeds"].to(device, dtype),
                # float32: sizes above 256 are not exact in bfloat16, and the UNet embeds them in float32 anyway.
                "time_ids": sizes.to(device, torch.float32),
            },
            return_dict=False,
        )[0]
        return pred.float()
