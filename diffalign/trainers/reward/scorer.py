"""What trains: a CLIP, a LoRA of one, or a head on frozen embeddings; and how it is saved."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from diffalign.assets import resolve
from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.encoders import (
    TransformersEncoder,
    clip_scores,
    embed_images,
    embed_texts,
    load_config,
    load_encoder,
    load_preprocess,
    load_tokenizer,
)
from diffalign.rewards.trained import HEAD_FILE, RewardHead
from diffalign.trainers.reward.config import RewardTrainingConfig
from diffalign.training.checkpoints import space_errors

MAX_LOGIT_SCALE = math.log(100)
"""CLIP's own limit on what it learns as the scale of its cosines."""
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Scored = tuple[Tensor, Tensor, Tensor]
"""Scores (2B,), unit embeddings of the images (2B, P) and of the texts (B, P)."""


class CLIPScorer(nn.Module):
    """A CLIP that scores pairs: pixels (2B, 3, H, W), preferred halves first, and token ids (B, L)."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    @property
    def logit_scale(self) -> Tensor:
        scale: Tensor = self.clip.logit_scale
        return scale

    def forward(self, images: Tensor, texts: Tensor) -> Scored:
        embeddings, prompts = embed_images(self.clip, images), embed_texts(self.clip, texts)
        return clip_scores(self.clip, embeddings, prompts.repeat(2, 1)), embeddings, prompts


class HeadScorer(nn.Module):
    """A head that scores pairs: unit embeddings of images (2B, P), preferred halves first, and of texts (B, P)."""

    def __init__(self, head: RewardHead) -> None:
        super().__init__()
        self.head = head

    @property
    def logit_scale(self) -> Tensor:
        return self.head.logit_scale

    def forward(self, images: Tensor, texts: Tensor) -> Scored:
        return self.head(images, texts.repeat(2, 1)), images, texts


def processor_of(config: RewardTrainingConfig) -> str:
    """Where tokenizer and image processor of a config are."""
    return resolve(config.processor_name_or_path or config.pretrained_model_name_or_path)


def make_encoder(config: RewardTrainingConfig) -> TransformersEncoder:
    """The CLIP of a config with its processor: its weights, or random ones of its shape.

    Raises:
        UserError: it is not there, is no CLIP, or has no such setting as ``model_config`` names.
    """
    checkpoint, processor = resolve(config.pretrained_model_name_or_path), processor_of(config)
    if not config.from_scratch:
        return load_encoder(checkpoint, processor, revision=config.revision)
    clip_config = load_config(checkpoint, ("clip",), revision=config.revision)
    for name, value in (config.model_config or {}).items():
        _change(clip_config, name, value)
    preprocess = load_preprocess(processor)
    if preprocess.crop != clip_config.vision_config.image_size:
        raise UserError(
            f"the model takes {clip_config.vision_config.image_size} pixels but its processor makes {preprocess.crop}"
        )
    tokenizer = load_tokenizer(processor, clip_config.text_config.vocab_size)
    return TransformersEncoder(CLIPModel(clip_config).requires_grad_(False), preprocess, tokenizer, "longest")


def _change(config: CLIPConfig, name: str, value: Any) -> None:
    *path, last = name.split(".")
    place: Any = config
    for step in (*path, last):
        if not hasattr(place, step):
            known = [key for key in place.to_dict() if not key.startswith("_")]
            raise UserError(f"model_config: the CLIP's config has no {name!r}.{did_you_mean(step, known)}")
        if step is not last:
            place = getattr(place, step)
    if isinstance(getattr(place, last), (dict, list)) or hasattr(getattr(place, last), "to_dict"):
        raise UserError(f"model_config: {name!r} is no single value; name one below it")
    setattr(place, last, value)


def make_scorer(config: RewardTrainingConfig, encoder: TransformersEncoder) -> CLIPScorer | HeadScorer:
    """What trains of an encoder, with gradients on for just that; weights that train are float32."""
    clip = encoder.model
    if config.train_mode == "head":
        hidden, scale = config.head_hidden, float(clip.logit_scale)
        return HeadScorer(RewardHead(clip.config.projection_dim, hidden, config.head_dropout, scale))
    if config.gradient_checkpointing:
        clip.gradient_checkpointing_enable()
    if config.train_mode == "full":
        return CLIPScorer(clip.requires_grad_(True))
    scale = clip.logit_scale.detach().clone().float()
    clip = clip.to(_DTYPES[config.mixed_precision])
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha or config.rank,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets or LORA_TARGETS),
    )
    try:
        adapted = get_peft_model(clip, lora)
    except ValueError as error:
        raise UserError(f"lora_targets {config.lora_targets}: {error}") from error
    if config.gradient_checkpointing:
        clip.enable_input_require_grads()
    clip.logit_scale.data = scale
    clip.logit_scale.requires_grad_(True)
    return CLIPScorer(adapted)


def trained_state(scorer: nn.Module) -> dict[str, Tensor]:
    """The weights that train, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in scorer.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained_state(scorer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`trained_state` gave.

    Raises:
        UserError: other weights train now.
    """
    own = {name: p for name, p in scorer.named_parameters() if p.requires_grad}
    if set(own) != set(state) or any(own[name].shape != state[name].shape for name in own):
        raise UserError(
            "the checkpoint is of another train_mode, rank or model: resume with the config it was saved by"
        )
    for name, parameter in own.items():
        parameter.copy_(state[name])


@torch.no_grad()
def divide(scorer: CLIPScorer | HeadScorer, temperature: float) -> None:
    """Divide all scores by a temperature above 0."""
    if isinstance(scorer, HeadScorer):
        scorer.head.divide(temperature)
    else:
        scorer.logit_scale.sub_(math.log(temperature))


def save_model(
    scorer: CLIPScorer | HeadScorer, encoder: TransformersEncoder, processor: str, folder: Path, dtype: torch.dtype
) -> None:
    """Write weights (a LoRA merged into them) and processor into the folder, each file aside and then into place."""
    with space_errors(folder):
        aside = Path(tempfile.mkdtemp(prefix=".reward.", dir=folder))
        try:
            if isinstance(scorer, HeadScorer):
                save_file(trained_state(scorer.head), aside / HEAD_FILE)
            else:
                clip = scorer.clip.float().merge_and_unload() if isinstance(scorer.clip, PeftModel) else scorer.clip
                clip.to(dtype).save_pretrained(aside)
                images = CLIPImageProcessor.from_pretrained(processor)
                CLIPProcessor(image_processor=images, tokenizer=encoder.tokenizer).save_pretrained(aside)
            for path in sorted(aside.iterdir()):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@torch.no_grad()
def embed_all(encoder: TransformersEncoder, images: Sequence[Tensor], batch_size: int, device: torch.device) -> Tensor:
    """Unit embeddings (N, P) on the CPU of preprocessed pictures (3, H, W)."""
    parts = [
        encoder.embed_pixels(torch.stack(list(images[start : start + batch_size])).to(device, encoder.dtype)).cpu()
        for start in range(0, len(images), batch_size)
    ]
    return torch.cat(parts)
