"""Models that put images and texts into one space: CLIP and SigLIP of transformers, and those of open_clip, alike.

Whatever the dtype of a model, its embeddings are made float32 before they are normalised: half precision there would
quantise scores to steps of 0.016 (fp16) or 0.125 (bf16) at a score of 20.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoTokenizer, CLIPModel, CLIPTokenizer, SiglipModel
from transformers.image_processing_utils import BaseImageProcessor

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import load_from, load_model
from diffalign.rewards.pixels import Preprocess

KINDS: dict[str, Any] = {"clip": CLIPModel, "siglip": SiglipModel}
"""Model types of transformers that are understood."""


def unwrap(output: Any) -> Tensor:
    """The projected features (B, P) from whatever ``get_image_features`` or ``get_text_features`` returned.

    A tensor in transformers 4, an object with ``pooler_output`` in transformers 5, a tuple
    (last_hidden_state, features) with ``return_dict=False``.
    """
    if isinstance(output, Tensor):
        return output
    features = output.pooler_output if hasattr(output, "pooler_output") else output[1]
    if not isinstance(features, Tensor):
        raise TypeError(
            f"expected projected CLIP features in {type(output).__name__}, found {type(features).__name__}"
        )
    return features


def unit(features: Tensor) -> Tensor:
    """Rows (B, P) of length 1, float32; float64 stays."""
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def embed_images(model: CLIPModel, pixel_values: Tensor) -> Tensor:
    """Unit embeddings (B, P), float32, of preprocessed pixels (B, 3, H, W)."""
    return unit(unwrap(model.get_image_features(pixel_values=pixel_values)))


def embed_texts(model: CLIPModel, input_ids: Tensor) -> Tensor:
    """Unit embeddings (B, P), float32, of token ids (B, L) that end in the end token."""
    return unit(unwrap(model.get_text_features(input_ids=input_ids)))


def clip_scores(model: CLIPModel, images: Tensor, texts: Tensor) -> Tensor:
    """``exp(logit_scale) * cosine`` of unit embeddings, row by row: (B, P) and (B, P) to (B,), float32."""
    return torch.exp(model.logit_scale.float()) * (images * texts).sum(-1)


class Encoder(nn.Module, ABC):
    """An image and a text tower with what comes before them.

    Attributes:
        model: the library's.
        preprocess: from pictures to the pixels that it takes.
        scale: exp(logit_scale), a plain number, so that no dtype rounds it.
        context: tokens of a text, with the first and last one.
    """

    def __init__(self, model: Any, preprocess: Preprocess, context: int) -> None:
        super().__init__()
        self.model = model
        self.eval()
        self.preprocess, self.context = preprocess, context
        self.scale = math.exp(float(model.logit_scale))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, P), float32, of images (B, 3, H, W) in [0, 1]; with the gradient where it is on."""
        pixels = self.preprocess(images, exact=not torch.is_grad_enabled())
        return self.embed_pixels(pixels.to(self.dtype))

    @abstractmethod
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Unit embeddings (B, P), float32, of preprocessed pixels."""

    @abstractmethod
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings (N, P), float32; what is longer than the context is cut. Does not depend on the batch."""

    @abstractmethod
    def lengths(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt before it is cut."""


class TransformersEncoder(Encoder):
    """A CLIP or SigLIP of transformers."""

    def __init__(self, model: Any, preprocess: Preprocess, tokenizer: Any, padding: Literal["longest", "max_length"]):
        super().__init__(model, preprocess, model.config.text_config.max_position_embeddings)
        self.tokenizer, self.padding = tokenizer, padding

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return embed_images(self.model, pixels)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        options = {"padding": self.padding, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        return embed_texts(self.model, self.tokenizer(prompts, **options).input_ids.to(self.device))

    def lengths(self, prompts: list[str]) -> list[int]:
        return [len(row) for row in self.tokenizer(prompts, verbose=False).input_ids]


def load_encoder(
    checkpoint: str,
    processor: str,
    *,
    kinds: tuple[str, ...] = ("clip",),
    revision: str | None = None,
    local_files_only: bool = False,
    advice: str = "",
) -> TransformersEncoder:
    """A frozen encoder of transformers in float32, on the CPU.

    Args:
        checkpoint, processor: folders or hub ids of the model, and of its tokenizer and image processor.
        kinds: model types that are accepted, of :data:`KINDS`.
        revision: of the checkpoint on the hub, and of the processor if it is the same.
        advice: where the processor usually is, for the error when it is missing.

    Raises:
        UserError: one of them is not there, the checkpoint is of another model or incomplete, or the processor is of
            another model.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    config = load_config(checkpoint, kinds, **options)
    model = load_model(KINDS[config.model_type], checkpoint, **options)
    if processor != checkpoint:
        options["revision"] = None
    preprocess = load_preprocess(processor, advice=advice, **options)
    side = config.vision_config.image_size
    if preprocess.crop != side:
        raise UserError(
            f"the image processor in {processor!r} makes pictures of {preprocess.crop} pixels, but {checkpoint!r} "
            f"takes {side}: it is of another model. {advice or 'Give the place of the right one as processor=.'}"
        )
    kind = CLIPTokenizer if config.model_type == "clip" else AutoTokenizer
    tokenizer = load_tokenizer(processor, config.text_config.vocab_size, kind=kind, advice=advice, **options)
    # A CLIP text stops at its end token, whatever follows; a SigLIP reads the padding and was trained on full length.
    padding: Literal["longest", "max_length"] = "longest" if config.model_type == "clip" else "max_length"
    return TransformersEncoder(model, preprocess, tokenizer, padding)


def load_config(checkpoint: str, kinds: tuple[str, ...], **options: Any) -> Any:
    """The config of a checkpoint of transformers.

    Raises:
        UserError: it is not there, or of another type of model than ``kinds``.
    """
    config = load_from(AutoConfig.from_pretrained, checkpoint, **options)
    if config.model_type not in kinds:
        raise UserError(f"{checkpoint!r} is a {config.model_type}, not a {' or '.join(kinds)}")
    return config


def load_tokenizer(
    processor: str, vocab_size: int, *, kind: Any = CLIPTokenizer, advice: str = "", **options: Any
) -> Any:
    """The tokenizer of a model.

    Raises:
        UserError: it is not there, or not of a model of ``vocab_size`` tokens; transformers makes an empty one where
            its files are missing.
    """
    tokenizer = load_from(kind.from_pretrained, processor, advice=advice, **options)
    if not 0.9 * vocab_size <= len(tokenizer) <= vocab_size:
        raise UserError(
            f"the tokenizer in {processor!r} has {len(tokenizer)} tokens, but the model has {vocab_size}: it is of "
            f"another model, or its files are missing. {advice or 'Give the place of the right one as processor=.'}"
        )
    return tokenizer


def load_preprocess(processor: str, *, advice: str = "", **options: Any) -> Preprocess:
    """The image processing that a checkpoint's processor config describes.

    Raises:
        UserError: there is none, or it does what no CLIP or SigLIP does.
    """
    reader = BaseImageProcessor.get_image_processor_dict
    config, _ = load_from(reader, processor, what="the image processor", advice=advice, **options)
    return Preprocess.from_config(config)
