"""What every reward on a CLIP shares: features as tensors, normalised in float32, and the score they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel


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


def embed_images(model: CLIPModel, pixel_values: Tensor) -> Tensor:
    """Unit embeddings (B, P), float32, of preprocessed pixels (B, 3, H, W)."""
    return normalize(unwrap(model.get_image_features(pixel_values=pixel_values)).float(), dim=-1)


def embed_texts(model: CLIPModel, input_ids: Tensor) -> Tensor:
    """Unit embeddings (B, P), float32, of token ids (B, L) that end in the end token."""
    return normalize(unwrap(model.get_text_features(input_ids=input_ids)).float(), dim=-1)


def clip_scores(model: CLIPModel, images: Tensor, texts: Tensor) -> Tensor:
    """``exp(logit_scale) * cosine`` of unit embeddings, row by row: (B, P) and (B, P) to (B,), float32."""
    return torch.exp(model.logit_scale.float()) * (images * texts).sum(-1)
