"""Models of open_clip as encoders: those it lists, hub repositories and folders in its layout, and weight files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from accelerate import init_empty_weights
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained
from torch import Tensor, nn
from transformers import CLIPConfig

from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.checkpoints import fill, load_from, locate
from diffalign.rewards.encoders import Encoder, embed_images, embed_texts, unit
from diffalign.rewards.pixels import Preprocess

HUB_PREFIX = "hf-hub:"
_WEIGHTS = (HF_SAFE_WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", HF_WEIGHTS_NAME)


class OpenClipEncoder(Encoder):
    """A model of open_clip with the tokenizer that goes with it."""

    def __init__(self, model: Any, preprocess: Preprocess, tokenizer: Any) -> None:
        super().__init__(model, preprocess, tokenizer.context_length)
        self.tokenizer = tokenizer

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return unit(self.model.encode_image(pixels))

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        return unit(self.model.encode_text(self.tokenizer(prompts).to(self.device)))

    def lengths(self, prompts: list[str]) -> list[int]:
        if hasattr(self.tokenizer, "encode"):
            return [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts]  # the first and last token
        return [len(self.tokenizer.tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]


class ConvertedEncoder(OpenClipEncoder):
    """A model of open_clip whose weights were converted to a ``CLIPModel`` of transformers."""

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return embed_images(self.model, pixels)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        return embed_texts(self.model, self.tokenizer(prompts).to(self.device))


def architecture(name: str) -> dict[str, Any]:
    """The config of a model: by a name that open_clip knows, or a JSON file in its form.

    Raises:
        UserError: neither; says which names are near.
    """
    if name.endswith(".json"):
        file = Path(name).expanduser()
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            config = config.get("model_cfg", config)
            if {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
                return dict(config)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{file} is not the config of an open_clip model: {error}") from error
        raise UserError(f"{file} is not the config of an open_clip model: it lacks embed_dim, vision_cfg or text_cfg")
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"open_clip has no model {name!r}.{did_you_mean(name, open_clip.list_models())}")
    return config


def clip_config(config: Mapping[str, Any]) -> CLIPConfig:
    """What transformers calls the model of a config of open_clip."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    towers = {
        "vision_config": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        },
        "text_config": {
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "num_attention_heads": text["heads"],
            "eos_token_id": 2,  # the library's sign for "the largest id", which is where these models end a text
        },
    }
    for tower, own in (("vision_config", vision), ("text_config", text)):
        width = own["width"]
        towers[tower] |= {
            "hidden_size": width,
            "intermediate_size": int(width * own.get("mlp_ratio", 4)),
            "num_hidden_layers": own["layers"],
            "hidden_act": act,
        }
    return CLIPConfig(**towers, projection_dim=config["embed_dim"])


def from_state_dict(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str, kind: str) -> nn.Module:
    """A frozen open_clip CLIP in float32 and eval mode with these weights, and none of its own.

    Raises:
        UserError: the model is more than a CLIP; or weights are missing, left over, or of another shape; names them.
    """
    other = set(config) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    if other or "hf_model_name" in config["text_cfg"]:
        raise UserError(f"{kind} is not a plain CLIP ({', '.join(sorted(other)) or 'its text tower is another'})")
    with init_empty_weights(include_buffers=False):
        model = open_clip.CLIP(**config)
    fill(model, state, source, kind)
    return model.eval().requires_grad_(False)


def is_open_clip(checkpoint: str) -> bool:
    """Whether a checkpoint is named as one of open_clip: ``hf-hub:ID``, ``MODEL:TAG``, or a folder in its layout."""
    folder = Path(checkpoint).expanduser()
    if folder.exists():
        return (folder / HF_CONFIG_NAME).is_file() and not (folder / "config.json").is_file()
    return ":" in checkpoint


def load_open_clip(checkpoint: str, *, revision: str | None = None, local_files_only: bool = False) -> OpenClipEncoder:
    """A frozen encoder of open_clip in float32, on the CPU.

    Args:
        checkpoint: ``hf-hub:owner/name``; a folder with ``open_clip_config.json``; or ``MODEL:TAG`` or ``MODEL:FILE``
            with a model and a tag that open_clip lists, such as ``ViT-B-32:laion2b_s34b_b79k``.
        revision: of the hub repository.

    Raises:
        UserError: it is not there, or its weights are not those of the model.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    if checkpoint.startswith(HUB_PREFIX):
        checkpoint = _download(checkpoint.removeprefix(HUB_PREFIX), **options)
    if Path(checkpoint).expanduser().is_dir():
        place = f"local-dir:{Path(checkpoint).expanduser()}"
        model = load_from(open_clip.create_model, place, what="the model", require_pretrained=True)
        tokenizer = load_from(open_clip.get_tokenizer, place, what="the tokenizer")
    else:
        name, _, weights = checkpoint.partition(":")
        architecture(name)
        tag = open_clip.get_pretrained_cfg(name, weights) or {}
        file = _weights_of(name, weights, tag, **options)
        steps = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
        # A model trained with QuickGELU and run with GELU gives other scores: open_clip only warns of it.
        force: dict[str, Any] = {"force_quick_gelu": bool(tag.get("quick_gelu")), "force_preprocess_cfg": steps}
        model = load_from(
            open_clip.create_model, name, what="the model", pretrained=str(file), require_pretrained=True, **force
        )
        tokenizer = load_from(open_clip.get_tokenizer, name, what="the tokenizer")
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    return OpenClipEncoder(model.eval().requires_grad_(False), preprocess, tokenizer)


def _download(repo: str, **options: Any) -> str:
    """The folder in the hub's cache with the config, the tokenizer if there is one, and the weights."""
    from huggingface_hub import snapshot_download

    load_from(snapshot_download, repo, what="the config", allow_patterns=["*.json", "*.txt", "*.model"], **options)
    return str(locate(repo, _WEIGHTS, what="open_clip weights", **options).parent)


def _weights_of(name: str, weights: str, tag: Mapping[str, Any], **options: Any) -> Path:
    if not tag:
        if Path(weights).expanduser().is_file():
            return Path(weights).expanduser()
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UserError(
            f"{weights!r} is neither a file nor a tag of open_clip's {name}.{did_you_mean(weights, tags)} "
            f"Its tags: {', '.join(tags) or 'none'}."
        )
    repo, _, file = tag.get("hf_hub", "").rpartition("/")
    if repo:
        names = (file,) if file else _WEIGHTS
        return locate(repo, names, what=f"weights of {name}:{weights}", **options)
    if options["local_files_only"]:
        raise UserError(
            f"{name}:{weights} is not on the hub, and nothing is downloaded (local_files_only). Give a local file: "
            f"{name}:path/to/weights.pt"
        )
    return Path(load_from(lambda _: download_pretrained(dict(tag)), f"{name}:{weights}", what="weights"))
