"""Stage 2: the UNet with its two text encoders, trained together on cached latents of captioned scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffalign.diffusion.noise import from_scheduler_config
from diffalign.diffusion.random import keyed_generator
from diffalign.shapes import scene
from diffalign.shapes.building.models import build_scheduler, build_text_encoders, build_unet
from diffalign.shapes.building.stage import Schedule, train_stage
from diffalign.shapes.building.vae import save_sheet, to_pixels
from diffalign.shapes.checker import score
from diffalign.shapes.tokenizer import build_tokenizer

SCENES = 24576
BATCH = 64
CAPTION_DROPOUT = 0.1
SNR_GAMMA = 5.0
GUIDANCE = 5.0
STEPS = 25
SCHEDULE = Schedule(steps=4000, stop=3000, learning_rate=2e-3, ema_decay=0.998, weight_decay=1e-3, warmup=200)


class Denoiser(nn.Module):
    """UNet and text encoders as one module, called as an SDXL pipeline calls them."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = build_text_encoders(tokenizer)
        self.unet = build_unet()

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict the noise in (B, C, 8, 8) latents at (B,) timesteps given (B, L) token ids."""
        one = self.text_encoder(tokens, output_hidden_states=True)
        two = self.text_encoder_2(tokens, output_hidden_states=True)
        embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        sizes = torch.tensor([[scene.SIZE, scene.SIZE, 0, 0, scene.SIZE, scene.SIZE]], device=latents.device)
        added = {"text_embeds": two.text_embeds, "time_ids": sizes.expand(len(latents), 6)}
        prediction: Tensor = self.unet(latents, timesteps, embeds, added_cond_kwargs=added).sample
        return prediction


def draw_scenes(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Captions of the training split and a picture of each: texts and (count, 3, 64, 64) uint8."""
    rng = np.random.default_rng([seed, 2])
    captions: list[str] = []
    pictures = []
    while len(captions) < count:
        spec = scene.sample_spec(rng)
        if scene.is_heldout(spec.caption()):
            continue
        captions.append(spec.caption())
        pictures.append(np.asarray(scene.render(scene.complete(spec, rng))))
    return captions, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def build_pipeline(denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """The parts as a plain diffusers pipeline."""
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        # Dropped captions are encoded as "" in training, so the unconditional half of guidance must be too.
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: StableDiffusionXLPipeline, prompts: list[str], seeds: list[int], batch: int = 64
) -> list[Image.Image]:
    """Draw one image for each prompt and seed, 25 DDIM steps with guidance."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        with torch.no_grad():
            output = pipe(prompts[part], num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators)
        images += output.images
    return images


def train_denoiser(
    folder: Path, vae: AutoencoderKL, work: Path, seed: int, device: str, schedule: Schedule = SCHEDULE
) -> StableDiffusionXLPipeline:
    """Train and save the whole SDXL pipeline folder (UNet and VAE in float16) and return it, read back."""
    if not (folder / "model_index.json").exists():
        torch.manual_seed(seed + 1)
        tokenizer = build_tokenizer(work / "tokenizer")
        denoiser = Denoiser(tokenizer).to(device)
        _train(denoiser, vae, tokenizer, work, seed, device, schedule)
        # The text encoders stay in float32: transformers loads weights in the dtype of the file, diffusers in float32.
        denoiser.unet.half()
        build_pipeline(denoiser, vae.half(), tokenizer).save_pretrained(folder)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _train(
    denoiser: Denoiser,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    work: Path,
    seed: int,
    device: str,
    schedule: Schedule,
) -> None:
    captions, pictures = draw_scenes(SCENES, seed)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_pixels(p).to(device)).latent_dist.mean for p in pictures.split(128)])

    def tokenize(texts: list[str]) -> Tensor:
        ids: Tensor = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(device)

    tokens, empty = tokenize(captions), tokenize([""])
    process = from_scheduler_config(build_scheduler().config)

    def loss_of_step(step: int) -> Tensor:
        generator = keyed_generator(seed, "denoiser", step)
        rows = torch.randint(SCENES, (BATCH,), generator=generator).to(device)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator).to(device)
        # One timestep for each 64th of the range, so that a batch always sees all noise levels.
        u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        t = process.sample_timesteps(u)
        dropped = (torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT).to(device)
        ids = torch.where(dropped[:, None], empty, tokens[rows])
        prediction = denoiser(process.add_noise(latents[rows], noise, t), t.to(device), ids)
        snr = process.snr(t)
        weight = (snr.clamp(max=SNR_GAMMA) / snr).float().to(device)
        return (weight * (prediction - noise).square().mean((1, 2, 3))).mean()

    prompts = scene.sample_captions(96, seed, heldout=False)

    def on_sample(step: int) -> None:
        denoiser.eval()
        images = sample(build_pipeline(denoiser, vae, tokenizer), prompts, list(range(len(prompts))))
        denoiser.train()
        mean = np.mean([score(image, prompt) for image, prompt in zip(images, prompts, strict=True)])
        print(f"denoiser step {step}: checker score {mean:.3f} on {len(prompts)} training prompts", flush=True)
        pictures = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        save_sheet(pictures, work / f"denoiser-{step:06d}.png", columns=16)

    train_stage("denoiser", denoiser, loss_of_step, schedule, work, on_sample)
