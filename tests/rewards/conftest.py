"""Tiny random CLIP checkpoints with the published key names, made by the tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    from tiny import tiny_tokenizer
finally:
    sys.path.pop(0)


def tiny_clip(tokenizer: CLIPTokenizer, seed: int = 0, **config: Any) -> CLIPModel:
    """A CLIP of 28 pixels in patches of 14, hidden size 32, projection 16, texts of up to 16 tokens."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, **{"projection_dim": 16, **config}))
        for parameter in model.parameters():  # embeddings that differ from image to image
            if parameter.ndim > 1:
                parameter.data *= 4
    return model.eval()


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a CLIP with its processor, as ``save_pretrained`` writes them. Read only."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer()
    tiny_clip(tokenizer).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)
