"""Tiny random checkpoints with the published key names, made by the tests, and every scorer on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from diffalign.rewards import Reward, load_reward
from diffalign.rewards.aesthetic import AestheticHead

sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    from tiny import WORDS, tiny_tokenizer
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
    return enlarged(model)


def enlarged(model: Any, factor: float = 4) -> Any:
    """With larger weights, so that embeddings differ from image to image."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= factor
    return model.eval()


TINY_VIT_H = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 40, "head_width": 20, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""The config of open_clip's ViT-H-14, scaled down; the heads of its image tower are not of 64 channels either."""


def tiny_open_clip(seed: int = 0, **config: Any) -> open_clip.CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return enlarged(open_clip.CLIP(**{**TINY_VIT_H, **config}), 2)


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a CLIP with its processor, as ``save_pretrained`` writes them. Read only."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer()
    tiny_clip(tokenizer).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def hps_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both published files of HPSv2, and ``tiny.json``, the config of their model. Read only."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "tiny.json").write_text(json.dumps(TINY_VIT_H))
    for seed, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        torch.save({"epoch": 3, "state_dict": tiny_open_clip(seed).state_dict()}, folder / name)
    return folder


@pytest.fixture(scope="session")
def open_clip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model as open_clip writes them to the hub. Read only."""
    folder = tmp_path_factory.mktemp("open_clip")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}
    config = {"model_cfg": TINY_VIT_H, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(tiny_open_clip(2).state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)


@pytest.fixture(scope="session")
def siglip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a SigLIP with its processor. Read only."""
    folder = tmp_path_factory.mktemp("siglip")
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    split = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=split, **special).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 12, "projection_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = {**tower, "image_size": 28, "patch_size": 14}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    enlarged(model, 2).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def head_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head for embeddings of 16, as the published file is: a plain dict of tensors. Read only."""
    file = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(AestheticHead([16, 8, 5, 4, 3, 1]).state_dict(), file)
    return file


Tiny: TypeAlias = Callable[..., Reward]
CLIP_SCORERS = ("pickscore", "hpsv2", "hpsv2.1", "aesthetic", "clipscore", "clipscore:siglip", "clipscore:open_clip")


@pytest.fixture(scope="session")
def tiny_reward(
    clip_path: str, hps_path: Path, head_path: Path, siglip_path: str, open_clip_path: str
) -> Callable[..., Reward]:
    """``tiny_reward(name, **options)`` for every name of CLIP_SCORERS: the scorer on a tiny checkpoint, on the CPU."""
    hps = {"checkpoint": str(hps_path), "architecture": str(hps_path / "tiny.json")}
    places: dict[str, tuple[str, dict[str, Any]]] = {
        "pickscore": ("pickscore", {"checkpoint": clip_path}),
        "hpsv2": ("hpsv2", hps),
        "hpsv2.1": ("hpsv2.1", hps),
        "aesthetic": ("aesthetic", {"checkpoint": str(head_path), "tower": clip_path}),
        "clipscore": ("clipscore", {"checkpoint": clip_path, "form": "cosine"}),
        "clipscore:siglip": ("clipscore", {"checkpoint": siglip_path, "form": "cosine"}),
        "clipscore:open_clip": ("clipscore", {"checkpoint": open_clip_path, "form": "cosine"}),
    }

    def make(name: str, **options: Any) -> Reward:
        reward, given = places[name]
        return load_reward(reward, **{"device": "cpu", "local_files_only": True, **given, **options})

    return make
