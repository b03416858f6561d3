"""Bare loops of LCD and RG-LCD, as a reader of the papers writes them with diffusers, transformers and peft alone.

One batch lies in memory, and every step trains on it. The teacher runs once with the prompt and once without, latents
are decoded all at once, and the reward is a CLIP on the pixels. Nothing around: no data, no keys, no checks, no log.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize, softmax
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffalign.assets import resolve
from diffalign.trainers.lcd import LCDConfig
from diffalign.trainers.rg_lcd import RGLCDConfig


class BareLCD:
    """LCD with a LoRA.

    Args:
        config: learning rate, rank and constants are its own; the model is SDXL's kind and predicts epsilon.
        batch: ``latents``, ``noise``, ``timesteps``, ``previous``, ``w``, ``sizes``, the prompts' embeddings ``text``
            and ``pooled``, and those without a prompt, ``no_text`` and ``no_pooled``; B rows each.
        prompts: of the B images.
    """

    def __init__(
        self, config: LCDConfig, batch: Mapping[str, Tensor], prompts: Sequence[str], device: torch.device
    ) -> None:
        self.config, self.prompts, self.device = config, list(prompts), device
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.folder = resolve(config.pretrained_model_name_or_path)
        self.unet = UNet2DConditionModel.from_pretrained(self.folder, subfolder="unet", torch_dtype=torch.float32)
        self.unet.to(device).requires_grad_(False)
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=config.lora_targets)
        self.unet.add_adapter(lora)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate)
        scheduler = DDPMScheduler.from_pretrained(self.folder, subfolder="scheduler")
        self.abar = scheduler.alphas_cumprod.to(device)

    def step(self) -> float:
        """One optimiser step; returns the loss."""
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self) -> Tensor:
        return self.distil()[0]

    def distil(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the student's f and the target's."""
        b = self.batch
        t, previous = b["timesteps"], b["previous"]
        alpha, sigma = self.levels(t)
        x_t = alpha * b["latents"] + sigma * b["noise"]
        self.unet.disable_adapters()
        with torch.no_grad():
            cond = self.epsilon(x_t, t, b["text"], b["pooled"])
            uncond = self.epsilon(x_t, t, b["no_text"], b["no_pooled"])
        self.unet.enable_adapters()
        epsilon = cond + b["w"].view(-1, 1, 1, 1) * (cond - uncond)
        next_alpha, next_sigma = self.levels(previous)
        x_previous = next_alpha * (x_t - sigma * epsilon) / alpha + next_sigma * epsilon
        with torch.no_grad():
            target = self.f(x_previous, previous)
        student = self.f(x_t, t)
        c = self.config.huber_c
        return ((student - target).square() + c**2).sqrt().sub(c).mean(), student, target

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def epsilon(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": self.batch["sizes"].float()}
        return self.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=added).sample

    def f(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        x0 = (x - sigma * self.epsilon(x, t, self.batch["text"], self.batch["pooled"])) / alpha
        scaled = self.config.timestep_scaling_factor * t.view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * x0


class BareRGLCD(BareLCD):
    """RG-LCD by the bundled CLIP, differentiated through the decoder."""

    config: RGLCDConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", torch_dtype=torch.float32)
        self.vae.to(self.device).requires_grad_(False)
        place = resolve("shapes-clip")
        self.clip = CLIPModel.from_pretrained(place, dtype=torch.float32).to(self.device).eval().requires_grad_(False)
        process = CLIPImageProcessor.from_pretrained(place)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (process.image_mean, process.image_std)
        )
        self.words = CLIPTokenizer.from_pretrained(place)(self.prompts, padding=True, return_tensors="pt")
        self.words = self.words.input_ids.to(self.device)
        with torch.no_grad():
            self.wanted = features(self.clip.get_text_features(self.words))

    def loss(self) -> Tensor:
        loss, student, _ = self.distil()
        return loss - self.config.reward_scale * self.reward(self.decode(student), self.wanted).mean()

    def decode(self, latents: Tensor) -> Tensor:
        return (self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def reward(self, images: Tensor, wanted: Tensor) -> Tensor:
        seen = features(self.clip.get_image_features((images - self.mean) / self.std))
        return self.clip.logit_scale.exp() * (seen * wanted).sum(-1)


class BareProxy(BareRGLCD):
    """RG-LCD by a proxy of that CLIP which looks at latents."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.proxy = copy.deepcopy(self.clip).requires_grad_(True)
        embeddings = self.proxy.vision_model.embeddings
        channels, side = self.batch["latents"].shape[1:3]
        embeddings.patch_size = side * embeddings.patch_size // embeddings.image_size
        width = embeddings.embed_dim
        embeddings.patch_embedding = nn.Conv2d(channels, width, embeddings.patch_size, embeddings.patch_size)
        self.proxy.to(self.device)
        self.proxy_optimizer = torch.optim.AdamW(self.proxy.parameters(), lr=self.config.proxy_learning_rate)

    def step(self) -> float:
        loss = super().step()
        self.teach()
        return loss

    def loss(self) -> Tensor:
        loss, student, target = self.distil()
        self.candidates = torch.stack([student.detach(), target, self.batch["latents"]], 1)
        self.proxy.requires_grad_(False)
        scores = self.judge(student, self.words)
        self.proxy.requires_grad_(True)
        return loss - self.config.reward_scale * scores.mean() / self.config.expert_scale

    def judge(self, latents: Tensor, words: Tensor) -> Tensor:
        seen = features(self.proxy.get_image_features(latents, interpolate_pos_encoding=True))
        return self.proxy.logit_scale.exp() * (seen * features(self.proxy.get_text_features(words))).sum(-1)

    def teach(self) -> None:
        """The proxy's step, on the first images of the batch."""
        self.proxy_loss().backward()
        torch.nn.utils.clip_grad_norm_(self.proxy.parameters(), self.config.max_grad_norm)
        self.proxy_optimizer.step()
        self.proxy_optimizer.zero_grad()

    def proxy_loss(self) -> Tensor:
        count = self.config.proxy_batch_size or len(self.prompts)
        latents = self.candidates[:count].flatten(0, 1)
        rows = torch.arange(min(count, len(self.prompts)), device=self.device).repeat_interleave(3)
        with torch.no_grad():
            expert = self.reward(self.decode(latents), self.wanted[rows]) * self.config.expert_scale
        own = self.judge(latents, self.words[rows])
        expert, own = expert.view(-1, 3), own.view(-1, 3)
        losses = [
            kl_div(log_softmax(own[:, pair], 1), softmax(expert[:, pair], 1), reduction="batchmean")
            for pair in ([0, 1], [0, 2], [1, 2])
        ]
        return torch.stack(losses).sum()


def features(output: Any) -> Tensor:
    """Unit rows of what a tower of CLIP gives."""
    return normalize(getattr(output, "pooler_output", output), dim=-1)
