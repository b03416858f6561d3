"""Stable Diffusion 1.x and 2.x: one CLIP text encoder; epsilon or v prediction, as the checkpoint says.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel

from diffalign.pipelines.base import Family
from diffalign.pipelines.kohya import KohyaNames
from diffalign.pipelines.prompts import tokenize, warn_truncated


class StableDiffusion(Family):
    """Text is {"prompt_embeds": (B, L, D)}: the last hidden states, after the final layer norm."""

    name = "sd"
    pipeline_class = StableDiffusionPipeline
    encoder_classes: ClassVar = {"text_encoder": CLIPTextModel}
    unused_parts = ("safety_checker", "feature_extractor", "image_encoder")

    @property
    def kohya(self) -> KohyaNames:
        later = self._denoiser_config.get("cross_attention_dim") == 1024
        v = self.noise_process.prediction_type == "v_prediction"
        return KohyaNames(
            base_version=("sd_v2" if later else "sd_v1") + ("_v" if v else ""),
            architecture=("stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512")
            if later
            else "stable-diffusion-v1",
            text={"text_encoder": "lora_te"},
            original_unet=False,
        )

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_length, int(self._denoiser_config["cross_attention_dim"]))}

    def encode_prompts(self, prompts: Sequence[str], *, grad: bool = False, warn: bool = True) -> dict[str, Tensor]:
        tokenizer, encoder = self.tokenizers["text_encoder"], self.text_encoders["text_encoder"]
        tokens, cut = tokenize(tokenizer, prompts)
        if warn:
            warn_truncated(prompts, cut, tokenizer.model_max_length)
        mask = tokens.mask.to(self.device) if getattr(encoder.config, "use_attention_mask", False) else None
        with torch.set_grad_enabled(grad):
            hidden = encoder(tokens.ids.to(self.device), attention_mask=mask).last_hidden_state
        return {"prompt_embeds": hidden.to(self.dtype)}

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        text: Mapping[str, Tensor],
        sizes: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        dtype = next(denoiser.parameters()).dtype
        pred: Tensor = denoiser(
            latents.to(dtype),
            timesteps.to(latents.device),
            encoder_hidden_states=text["prompt_embeds"].to(latents.device, dtype),
            timestep_cond=None if timestep_cond is None else timestep_cond.to(latents.device, dtype),
            return_dict=False,
        )[0]
        return pred.float()

    def _pipeline_options(self) -> dict[str, Any]:
        return {"requires_safety_checker": False}
