"""What every reward on a CLIP shares: features as tensors, normalised in float32, and the score they give."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, PretrainedConfig, PreTrainedModel

from diffalign.assets import resolve
from diffalign.errors import UserError
from diffalign.rewards.base import Reward, Scores
from diffalign.rewards.pixels import Preprocess

logger = logging.getLogger(__name__)

_CACHED_PROMPTS = 4096


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


class CLIPReward(Reward):
    """``exp(logit_scale)`` times the cosine of image and prompt, as a CLIP gives it; differentiable in the images.

    The embeddings are cast to float32 before they are normalised and multiplied, whatever the model's dtype: half
    precision there would quantise scores to steps of 0.016 (fp16) or 0.125 (bf16) at 20.

    Args:
        checkpoint: folder, hub id or bundled name in the layout of transformers' ``CLIPModel``.
        processor: where tokenizer and image processor are, if not with the checkpoint.
        revision: of the checkpoint on the hub.
        options: device, dtype, batch_size: see :class:`diffalign.rewards.base.Reward`.
    """

    differentiable = True
    scale = "bt_logit"
    default_checkpoint: ClassVar[str]
    default_processor: ClassVar[str | None] = None

    def __init__(
        self, checkpoint: str | None = None, processor: str | None = None, revision: str | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.checkpoint = resolve(checkpoint or self.default_checkpoint)
        # A checkpoint of one's own brings its processor; the published one has it elsewhere.
        self.processor = resolve(
            processor or (self.default_processor if checkpoint is None else None) or self.checkpoint
        )
        self.revision = revision
        self._embedded: OrderedDict[str, Tensor] = OrderedDict()

    def load(self) -> None:
        model = load_model(CLIPModel, self.checkpoint, self.revision)
        logit_scale = model.logit_scale.detach().clone()
        self.model = model.to(self.device, self.dtype)
        self.model.logit_scale.data = logit_scale.to(self.device)
        self.preprocess = load_preprocess(self.processor)
        self.tokenizer = load_tokenizer(self.processor, model.config.text_config.vocab_size)
        self.input_size = self.preprocess.crop

    def close(self) -> None:
        self._embedded.clear()
        super().close()

    def to(self, device: torch.device | str) -> Reward:
        self._embedded.clear()
        return super().to(device)

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        pixels = self.preprocess(images, exact=not torch.is_grad_enabled())
        embeddings = embed_images(self.model, pixels.to(self.dtype))
        scores = clip_scores(self.model, embeddings, self._embed_prompts(prompts))
        return scores, {"cosine": scores / self.model.logit_scale.exp()}

    @torch.no_grad()
    def _embed_prompts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings (N, P); a prompt seen before is not encoded again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embedded]
        if new:
            limit = self.model.config.text_config.max_position_embeddings
            ids = self.tokenizer(new, padding=True, return_tensors="pt", verbose=False).input_ids
            if ids.shape[1] > limit:
                whole = self.tokenizer(new, verbose=False).input_ids
                logger.warning(
                    "%s: %d of %d prompts are longer than %d tokens and were cut",
                    self.name,
                    sum(len(row) > limit for row in whole),
                    len(new),
                    limit,
                )
                options = {"padding": True, "truncation": True, "max_length": limit}
                ids = self.tokenizer(new, return_tensors="pt", **options).input_ids
            for prompt, embedding in zip(new, embed_texts(self.model, ids.to(self.device)), strict=True):
                self._embedded[prompt] = embedding
        result = torch.stack([self._embedded[prompt] for prompt in prompts])
        while len(self._embedded) > _CACHED_PROMPTS:
            self._embedded.popitem(last=False)
        return result


class PickScore(CLIPReward):
    """PickScore (Kirstain et al. 2023, "Pick-a-Pic", arXiv 2305.01569): the logit, about 17 to 25."""

    name = "pickscore"
    summary = "which of two pictures people would pick for a prompt"
    typical = (15.0, 28.0)
    default_checkpoint = "yuvalkirstain/PickScore_v1"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ShapesClip(CLIPReward):
    """The bundled small CLIP of the shapes world, trained with PickScore's objective."""

    name = "shapes-clip"
    summary = "which of two pictures of the shapes world its simulated annotators would pick"
    default_checkpoint = "shapes-clip"


def load_model(
    kind: type[PreTrainedModel], checkpoint: str, revision: str | None = None, config: PretrainedConfig | None = None
) -> Any:
    """A frozen model of transformers in float32 and eval mode, with the checkpoint's own config or ``config``.

    Raises:
        UserError: it is not there, or lacks weights of the model (transformers would draw them at random).
    """
    options = {"revision": revision, "config": config, "dtype": torch.float32, "output_loading_info": True}
    model, info = load_from(kind.from_pretrained, checkpoint, **options)
    missing, wrong = sorted(info["missing_keys"]), sorted(map(str, info.get("mismatched_keys", ())))
    if missing or wrong:
        raise UserError(
            f"{checkpoint!r} is not a checkpoint of a {kind.__name__}: "
            + (
                f"it lacks {len(missing)} weights ({', '.join(missing[:3])}, ...)"
                if missing
                else f"shapes of {wrong[:3]}"
            )
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(processor: str, vocab_size: int) -> CLIPTokenizer:
    """The tokenizer of a CLIP.

    Raises:
        UserError: it is not there, or not of a model of ``vocab_size`` tokens; transformers makes an empty one where
            its files are missing.
    """
    tokenizer = load_from(CLIPTokenizer.from_pretrained, processor)
    if not 0.9 * vocab_size <= len(tokenizer) <= vocab_size:
        raise UserError(
            f"the tokenizer in {processor!r} has {len(tokenizer)} tokens, but the model has {vocab_size}: it is of "
            "another model, or its files are missing. Give the place of the right one as processor=."
        )
    return tokenizer


def load_preprocess(processor: str) -> Preprocess:
    """The image processing that a checkpoint's processor config describes."""
    return Preprocess.from_config(load_from(CLIPImageProcessor.get_image_processor_dict, processor)[0])


def load_from(loader: Any, place: str, **options: Any) -> Any:
    """``loader(place)``, with an error that says which file of which checkpoint could not be had.

    Raises:
        UserError: it could not.
    """
    try:
        return loader(place, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"could not load {getattr(loader, '__self__', loader).__name__} from {place!r}: {str(error)[:400]} "
            "Give a folder, or a hub id that is reachable or was downloaded before (`hf download ID`)."
        ) from error
