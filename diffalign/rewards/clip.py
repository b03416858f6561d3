"""What every reward on a CLIP-like model shares, and PickScore."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.assets import resolve
from diffalign.rewards.base import Reward, Scores
from diffalign.rewards.checkpoints import load_from, load_model
from diffalign.rewards.encoders import (
    Encoder,
    clip_scores,
    embed_images,
    embed_texts,
    load_encoder,
    load_preprocess,
    load_tokenizer,
    unwrap,
)

__all__ = [
    "CLIPReward",
    "CosineReward",
    "PickScore",
    "ShapesClip",
    "clip_scores",
    "embed_images",
    "embed_texts",
    "load_from",
    "load_model",
    "load_preprocess",
    "load_tokenizer",
    "unwrap",
]

logger = logging.getLogger(__name__)

CACHED_PROMPTS = 4096
"""Embeddings of so many prompts are kept, those used last."""


class CosineReward(Reward):
    """A score made of the cosine of image and prompt in the space of an encoder; differentiable in the images.

    Embeddings are float32 before they are normalised and multiplied, whatever the model's dtype. Prompts longer than
    the model's context (75 tokens of a CLIP) are cut, with a warning. ``details["cosine"]`` is the bare cosine.
    A subclass says which encoder, and what score a cosine gives.

    Args:
        checkpoint: the model; ``default_checkpoint`` if None.
        revision: of the checkpoint on the hub.
        local_files_only: download nothing; take what is there.
        options: device, dtype, batch_size, offload: see :class:`diffalign.rewards.base.Reward`.
    """

    differentiable = True
    default_checkpoint: ClassVar[str]
    prompt_prefix = ""

    def __init__(
        self,
        checkpoint: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.checkpoint = resolve(checkpoint or self.default_checkpoint)
        self.revision, self.local_files_only = revision, local_files_only
        self._embedded: OrderedDict[str, Tensor] = OrderedDict()

    @abstractmethod
    def make_encoder(self) -> Encoder:
        """Read the model, in float32 on the CPU."""

    @abstractmethod
    def from_cosine(self, cosine: Tensor) -> Tensor:
        """The score, from cosines (n,) in [-1, 1], float32."""

    def load(self) -> None:
        self.encoder = self.make_encoder().to(self.device, self.dtype)
        self.input_size = self.encoder.preprocess.crop

    def close(self) -> None:
        self._embedded.clear()
        super().close()

    def to(self, device: torch.device | str) -> Reward:
        self._embedded.clear()
        return super().to(device)

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        cosine = (self.encoder.embed(images) * self._embed_prompts(prompts)).sum(-1)
        return self.from_cosine(cosine), {"cosine": cosine}

    @torch.no_grad()
    def _embed_prompts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings (N, P); a prompt seen lately is not encoded again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embedded]
        if new:
            texts = [self.prompt_prefix + prompt for prompt in new]
            self._warn_of_cut(texts)
            self._embedded.update(zip(new, self.encoder.embed_prompts(texts), strict=True))
        for prompt in prompts:
            self._embedded.move_to_end(prompt)
        result = torch.stack([self._embedded[prompt] for prompt in prompts])
        while len(self._embedded) > CACHED_PROMPTS:
            self._embedded.popitem(last=False)
        return result

    def _warn_of_cut(self, texts: list[str]) -> None:
        cut = sum(length > self.encoder.context for length in self.encoder.lengths(texts))
        if cut:
            message = "%s: %d of %d prompts are longer than %d tokens and were cut"
            logger.warning(message, self.name, cut, len(texts), self.encoder.context)


class CLIPReward(CosineReward):
    """``exp(logit_scale)`` times the cosine of image and prompt, by a CLIP of transformers.

    Args:
        checkpoint: folder, hub id or bundled name in the layout of transformers' ``CLIPModel``.
        processor: where tokenizer and image processor are, if not with the checkpoint.
        options: of :class:`CosineReward`.
    """

    scale: Literal["bt_logit", "cosine"] = "bt_logit"
    default_processor: ClassVar[str | None] = None

    def __init__(self, checkpoint: str | None = None, processor: str | None = None, **options: Any) -> None:
        super().__init__(checkpoint, **options)
        # A checkpoint of one's own brings its processor; the published one has it elsewhere.
        elsewhere = self.default_processor if checkpoint in (None, self.default_checkpoint) else None
        self.processor = resolve(processor or elsewhere or self.checkpoint)

    def make_encoder(self) -> Encoder:
        usual = f" ({self.name}'s is {self.default_processor})" if self.default_processor else ""
        return load_encoder(
            self.checkpoint,
            self.processor,
            revision=self.revision,
            local_files_only=self.local_files_only,
            advice=f"Give the place of tokenizer and image processor, a folder or hub id, as processor={usual}.",
        )

    def from_cosine(self, cosine: Tensor) -> Tensor:
        return self.encoder.scale * cosine


class PickScore(CLIPReward):
    """PickScore (Kirstain et al. 2023, "Pick-a-Pic", arXiv 2305.01569): the logit, about 17 to 25.

    A difference of 1 means that 73 percent prefer the better one. Other projects divide by 26, or give the cosine.
    The shortest side becomes 224 pixels and the middle is judged: the borders of wide pictures are not seen.
    """

    name = "pickscore"
    version = "transformers-crop-1"
    summary = "which of two pictures people would pick for a prompt"
    typical = (15.0, 28.0)
    input_size = 224
    memory_gb = 1.97
    licence = "MIT (code); see the hub page for the weights"
    hacks = (
        "Late in training pictures turn glossy, saturated and busy with detail, and resemble each other.",
        "Counts, places and text in the prompt weigh little, so they are traded for looks.",
        "Direct back-propagation finds fine checker patterns that raise the score and nothing else.",
    )
    default_checkpoint = "yuvalkirstain/PickScore_v1"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ShapesClip(CLIPReward):
    """The bundled small CLIP of the shapes world, trained with PickScore's objective."""

    name = "shapes-clip"
    version = "transformers-crop-1"
    summary = "which of two pictures of the shapes world its simulated annotators would pick"
    typical = (9.0, 24.0)
    licence = "Apache-2.0"
    input_size = 64
    hacks = ("It knows only pictures like those it was trained on: noise outside the shapes world can score high.",)
    default_checkpoint = "shapes-clip"
