"""The plain loop: Diffusion-DPO and MaPO as the usual training scripts for SDXL run them, for comparison.

Each step encodes both images of a pair with the VAE, in float32 as SDXL's needs, and the prompt with both text
encoders; chosen and rejected go through the UNet in two calls; the reference is a second UNet. LoRA, bf16 autocast and
AdamW are as in the scripts.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from sdxl_model import random_encoders
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from diffalign.pipelines.base import Family


class PlainLoop:
    """One run of it.

    Args:
        family: whose denoiser trains; it gets a LoRA of its own.
        reference: with a second UNet (Diffusion-DPO), or without (MaPO).
        batch_size: pairs.
        resolution: of the images, in pixels.
        rank: of the LoRA.
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self, family: Family, *, reference: bool, batch_size: int, resolution: int, rank: int, checkpointing: bool
    ) -> None:
        self.device = family.device
        self.size, self.resolution = batch_size, resolution
        self.unet = family.denoiser.train()
        self.reference = copy.deepcopy(self.unet) if reference else None
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        self.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
        )
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.vae, self.text_encoders = random_encoders(family)
        self.schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)

    def step(self) -> None:
        """One optimiser step on random pictures and tokens."""
        pixels = torch.rand(2, self.size, 3, self.resolution, self.resolution, device=self.device) * 2 - 1
        words = self.text_encoders[0].config
        length = words.max_position_embeddings
        tokens = torch.randint(0, words.vocab_size, (self.size, length), device=self.device)
        with torch.no_grad():
            chosen, rejected = (
                self.vae.encode(half).latent_dist.sample().float() * self.vae.config.scaling_factor
                for half in pixels.to(self.vae.dtype)
            )
            encoded = [encoder(tokens, output_hidden_states=True) for encoder in self.text_encoders]
            text = torch.cat([output.hidden_states[-2] for output in encoded], -1)
            pooled = encoded[-1].text_embeds
        noise = torch.randn_like(chosen)
        timesteps = torch.randint(0, 1000, (self.size,), device=self.device)
        size = [self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]
        given = {
            "encoder_hidden_states": text,
            "added_cond_kwargs": {
                "text_embeds": pooled,
                "time_ids": torch.tensor([size], device=self.device).expand(self.size, 6),
            },
        }

        def error(unet: torch.nn.Module, latents: Tensor) -> Tensor:
            noisy = self.schedule.add_noise(latents, noise, timesteps).to(text.dtype)
            predicted = unet(noisy, timesteps, **given).sample
            return mse_loss(predicted.float(), noise.float(), reduction="none").mean((1, 2, 3))

        with self._autocast():
            m_w, m_l = error(self.unet, chosen), error(self.unet, rejected)
            if self.reference is not None:
                with torch.no_grad():
                    r_w, r_l = error(self.reference, chosen), error(self.reference, rejected)
                loss = -logsigmoid(-0.5 * 5000 * ((m_w - m_l) - (r_w - r_l))).mean()
            else:
                phi_w, phi_l = (0.5 * m / torch.expm1(0.5 * m) for m in (m_w, m_l))
                loss = (m_w - 0.1 * logsigmoid(1000 * (phi_w - phi_l))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16)
