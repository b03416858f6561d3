"""ImageReward (Xu et al. 2023, "ImageReward", arXiv 2304.05977): a BLIP whose text half looks at the image and is read
out as one number.

The published file is loaded as it is into the BLIP classes of transformers; its own package, which no longer imports
with current libraries, is not needed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from diffalign.assets import resolve
from diffalign.errors import UserError
from diffalign.rewards.aesthetic import AestheticHead
from diffalign.rewards.base import Reward, Scores
from diffalign.rewards.checkpoints import complain, fill, load_from, locate, read_weights
from diffalign.rewards.pixels import Preprocess

logger = logging.getLogger(__name__)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the logits of its training images: the published score is (logit - MEAN) / STD."""
WEIGHTS, CONFIG = "ImageReward.pt", "med_config.json"
_MAX_TOKENS = 35
_HEAD_SIZE = 64  # channels of an attention head, in every ViT of BLIP and in BERT
_NEW_TOKENS = ["[DEC]", "[ENC]"]  # BLIP adds them to BERT's vocabulary; no prompt has them
# The names of the port, and what the file calls the same; applied in this order.
_NAMES = (
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
    ("vision.post_layernorm.", "blip.visual_encoder.norm."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    ("text.", "blip.text_encoder."),
    ("head.", "mlp.layers."),
)
_KIND = "ImageReward"
# In the file, but not used by the score.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$")


class ImageRewardModel(nn.Module):
    """The network: a ViT, a BERT that attends to all tokens of the image, and five linear layers on its first token.

    The layers at the end have no activations between them and stay in float32.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = AestheticHead(widths).layers  # the same layers, here on a feature that is not normalised

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, source: str = "this file"
    ) -> ImageRewardModel:
        """The model in eval mode, frozen, in float32, with the weights of a published file.

        Sizes are read from the shapes of the weights.

        Args:
            state: tensors by the file's names.
            config: what ``med_config.json`` says of the text half; None for BERT's own settings.
            source: what errors call the file.

        Raises:
            UserError: weights are missing, left over, or of another shape; names them.
        """
        with init_empty_weights(include_buffers=False):
            model = cls(*_sizes(state, config or {}, source))
        expected = {published_name(name): name for name in model.state_dict()}
        used = {key: value for key, value in state.items() if not _UNUSED.match(key)}
        complain(source, _KIND, set(expected) - set(used), set(used) - set(expected))
        fill(model, {name: used[key] for key, name in expected.items()}, source, _KIND)
        return model.eval().requires_grad_(False)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B,) of preprocessed pixels (B, 3, S, S) and token ids (B, L) with their mask; not yet standardised.

        A difference of two logits of one prompt is that of a Bradley-Terry model.
        """
        tokens = self.vision(pixel_values=pixel_values).last_hidden_state
        states = self.text(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device),
            is_decoder=False,  # the config says it is one, or there would be no cross-attention; it sees both ways
        ).last_hidden_state
        feature = states[:, 0]
        logits: Tensor = self.head(feature.to(self.head[0].weight.dtype)).squeeze(-1)
        return logits


class ImageReward(Reward):
    """ImageReward-v1.0: about -2.3 to 2, with mean 0 and deviation 1 over the pictures it was trained on.

    Differentiable in the images. ``details["logit"]`` is the score before it is standardised.

    Args:
        checkpoint: hub id or folder with ``ImageReward.pt`` and ``med_config.json``; or a weight file, torch or
            safetensors, with the config beside it if it has one.
        processor: folder or hub id of BERT's tokenizer.
        revision: of the checkpoint on the hub.
        local_files_only: download nothing.
        options: device, dtype (of the two transformers; the last layers are float32), batch_size: see
            :class:`diffalign.rewards.base.Reward`.
    """

    name = "imagereward"
    summary = "which of several pictures people would rank first for a prompt"
    differentiable = True
    scale = "bt_logit"
    typical = (-2.5, 2.5)
    input_size = 224
    memory_gb = 0.89
    licence = "Apache-2.0"
    hacks = (
        "It rises on beyond 2, the best of real pictures: cap it there, as ReFL does with relu(2 - r).",
        "It reads 35 tokens: what a long prompt asks for at its end may be left out at no cost.",
    )

    def __init__(
        self,
        checkpoint: str = "THUDM/ImageReward",
        processor: str = "bert-base-uncased",
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.checkpoint, self.processor, self.revision = resolve(checkpoint), resolve(processor), revision
        self.local_files_only = local_files_only
        self._told = False

    def load(self) -> None:
        hub: dict[str, Any] = {"revision": self.revision, "local_files_only": self.local_files_only}
        file = locate(self.checkpoint, [WEIGHTS], what="weights of ImageReward", **hub)
        config = file.with_name(CONFIG)
        if not Path(self.checkpoint).expanduser().is_file():
            config = locate(self.checkpoint, [CONFIG], what="config of ImageReward's text half", **hub)
        model = ImageRewardModel.from_state_dict(read_weights(file), _text_config(config), str(file))
        self.tokenizer = load_bert_tokenizer(
            self.processor, model.text.config.vocab_size, local_files_only=self.local_files_only
        )
        side = model.vision.config.image_size
        self.preprocess = Preprocess(side, side, crop_rounds="even")  # the package crops by torchvision
        self.input_size = side
        model.vision.to(self.dtype)
        model.text.to(self.dtype)
        if self.dtype == torch.float64:
            model.head.double()
        self.model = model.to(self.device)

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        pixels = self.preprocess(images, exact=not torch.is_grad_enabled())
        ids, mask = self._tokens(prompts)
        logits = self.model(pixels.to(self.dtype), ids, mask)
        return standardised(logits), {"logit": logits}

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (N, 35): always padded to the full length, so that a batch does not change the arithmetic."""
        if not self._told:
            long = sum(len(row) > _MAX_TOKENS for row in self.tokenizer(prompts, verbose=False).input_ids)
            if long:
                self._told = True
                logger.warning(
                    "%s: %d of %d prompts are longer than %d tokens and are judged by their beginning; further ones "
                    "are not reported",
                    self.name,
                    long,
                    len(prompts),
                    _MAX_TOKENS,
                )
        options = {"padding": "max_length", "truncation": True, "max_length": _MAX_TOKENS}
        encoded = self.tokenizer(prompts, return_tensors="pt", **options)
        return encoded.input_ids.to(self.device), encoded.attention_mask.to(self.device)


def standardised(logits: Tensor) -> Tensor:
    """Scores as the package publishes them: mean 0 and deviation 1 over its training images."""
    return (logits - MEAN) / STD


def published_name(name: str) -> str:
    """What the published file calls the weight ``name`` of :class:`ImageRewardModel`."""
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return name


def load_bert_tokenizer(processor: str, vocab_size: int, **options: Any) -> BertTokenizer:
    """BERT's tokenizer with the two tokens that BLIP adds; ``options`` are those of ``from_pretrained``.

    Raises:
        UserError: it is not there, or not of a model of ``vocab_size`` tokens; transformers makes an empty one where
            its files are missing.
    """
    tokenizer: BertTokenizer = load_from(BertTokenizer.from_pretrained, processor, **options)
    tokenizer.add_tokens(_NEW_TOKENS, special_tokens=True)
    if len(tokenizer) != vocab_size:
        raise UserError(
            f"the tokenizer in {processor!r} has {len(tokenizer)} tokens (with {' and '.join(_NEW_TOKENS)}), but the "
            f"model has {vocab_size}: it is of another model, or its files are missing. ImageReward takes that of "
            "bert-base-uncased; give its place as processor=."
        )
    return tokenizer


def _text_config(file: Path) -> dict[str, Any] | None:
    """What ``med_config.json`` says; None if there is none."""
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{file} is not the config of a text model: {error}") from error


def _sizes(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> tuple[BlipVisionConfig, BlipTextConfig, tuple[int, ...]]:
    """The configs of both halves and the widths of the last layers, from the shapes of the weights."""
    visual, text, layers = "blip.visual_encoder", "blip.text_encoder", "mlp.layers"
    first = f"{text}.encoder.layer.0"
    linears = [f"{layers}.{index}.weight" for index in (0, 2, 4, 6, 7)]
    told_by = {
        "positions": f"{visual}.pos_embed",
        "patch": f"{visual}.patch_embed.proj.weight",
        "vision_ff": f"{visual}.blocks.0.mlp.fc1.weight",
        "words": f"{text}.embeddings.word_embeddings.weight",
        "text_positions": f"{text}.embeddings.position_embeddings.weight",
        "text_ff": f"{first}.intermediate.dense.weight",
        "cross": f"{first}.crossattention.self.key.weight",
    }
    complain(source, _KIND, {*told_by.values(), *linears} - set(state), ())
    shapes = {what: tuple(state[key].shape) for what, key in told_by.items()}
    width, patch, text_width = shapes["patch"][0], shapes["patch"][-1], shapes["words"][1]
    widths = (state[linears[0]].shape[1], *(state[key].shape[0] for key in linears))
    if shapes["cross"][1] != width or widths[0] != text_width:
        raise UserError(
            f"{source}: halves that do not fit: the text half takes images of {shapes['cross'][1]} and gives "
            f"{text_width}, the image half gives {width}, and the last layers take {widths[0]}"
        )
    vision_config = BlipVisionConfig(
        hidden_size=width,
        num_hidden_layers=_depth(state, f"{visual}.blocks"),
        num_attention_heads=_heads(width, source),
        intermediate_size=shapes["vision_ff"][0],
        image_size=round((shapes["positions"][1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    text_config = BlipTextConfig(
        vocab_size=shapes["words"][0],
        hidden_size=text_width,
        encoder_hidden_size=width,
        num_hidden_layers=_depth(state, f"{text}.encoder.layer"),
        num_attention_heads=_heads(text_width, source, config.get("num_attention_heads")),
        intermediate_size=shapes["text_ff"][0],
        max_position_embeddings=shapes["text_positions"][0],
        hidden_act=config.get("hidden_act", "gelu"),
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
        is_decoder=True,
    )
    return vision_config, text_config, widths


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key[len(prefix) + 1 :].split(".")[0]) for key in state if key.startswith(f"{prefix}."))


def _heads(width: int, source: str, count: int | None = None) -> int:
    if width % (count or _HEAD_SIZE):
        parts = f"into {count} attention heads, as {CONFIG} says" if count else f"into attention heads of {_HEAD_SIZE}"
        raise UserError(f"{source}: a width of {width} cannot be divided {parts}")
    return count or width // _HEAD_SIZE
