"""The LAION aesthetic predictor v2: a score of 1 to 10 from a CLIP image embedding, without a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from diffalign.assets import resolve
from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.checkpoints import load_model, locate, read_weights
from diffalign.rewards.encoders import load_config, load_preprocess, unit

__all__ = ["Aesthetic", "AestheticHead", "ShapesAesthetic", "load_tower", "read_weights"]

LAION_WIDTHS = (768, 1024, 128, 64, 16, 1)
_ADVICE = "Give the place of the image processor of the CLIP, a folder or hub id, as processor=."
_DROPOUT = (0.2, 0.2, 0.1, 0.0, 0.0)
_LINEARS = (0, 2, 4, 6, 7)
_RELU_LINEARS = (0, 3, 6, 9, 11)
PUBLISHED = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
"""The author's ``sac+logos+ava1-l14-linearMSE.pth`` as it is found on the hub."""
_FILES = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth", "model.safetensors", "model.pth")


class AestheticHead(nn.Module):
    """Five linear layers, by default without activations (christophschuhmann/improved-aesthetic-predictor).

    Its state dict has the published keys, ``layers.{0,2,4,6,7}.{weight,bias}``, or with ``relu`` (the sister file
    ``ava+logos-l14-reluMSE.pth``) ``layers.{0,3,6,9,11}``. ``widths`` are the sizes from the embedding to the score.
    Embeddings are normalised here, in float32: left out, scores are off by tens.
    """

    def __init__(self, widths: Sequence[int] = LAION_WIDTHS, *, relu: bool = False) -> None:
        super().__init__()
        if len(widths) != len(LAION_WIDTHS) or widths[-1] != 1:
            raise UserError(f"an aesthetic head has six widths, the last one 1, like {LAION_WIDTHS}; got {widths}.")
        self.widths = tuple(widths)
        modules: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            modules.append(nn.Linear(inputs, outputs))
            if relu and index < len(_DROPOUT) - 1:
                modules.append(nn.ReLU())
            if _DROPOUT[index]:
                modules.append(nn.Dropout(_DROPOUT[index]))
        self.layers = nn.Sequential(*modules)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> AestheticHead:
        """A head in eval mode with these weights, its widths and kind read from their names and shapes. Raises
        ``UserError`` naming the keys where they are not those of such a head."""
        for linears in (_LINEARS, _RELU_LINEARS):
            if set(state) == {f"layers.{index}.{part}" for index in linears for part in ("weight", "bias")}:
                break
        else:
            expected = ", ".join(f"layers.{{{','.join(map(str, kind))}}}" for kind in (_LINEARS, _RELU_LINEARS))
            raise UserError(
                f"not an aesthetic head: expected weight and bias of {expected}; "
                f"found {', '.join(sorted(state)) or 'none'}."
            )
        widths = [state["layers.0.weight"].shape[1], *(state[f"layers.{index}.weight"].shape[0] for index in linears)]
        head = cls(widths, relu=linears is _RELU_LINEARS)
        head.load_state_dict({key: value.float() for key, value in state.items()})
        return head.eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Image embeddings (B, P), normalised or not, to scores (B,) of about 1 to 10."""
        scores: Tensor = self.layers(unit(embeddings)).squeeze(-1)
        return scores


class Aesthetic(Reward):
    """The LAION aesthetic score: about 4.5 to 6.5 for pictures, differentiable, and easily overdone.

    Without activations it is one linear function of the embedding, which never saturates: train on it only with a cap
    or a target. The shortest side becomes 224 pixels and the middle is judged.

    Args:
        checkpoint: the head's weights: a ``.pth`` or ``.safetensors`` file, a folder or hub id that holds one, or
            ``owner/repo/file`` on the hub. Its input width may be another CLIP's, given as ``tower``.
        tower: folder, hub id or bundled name of the CLIP it was trained on.
        processor: where the CLIP's image processor is, if not with it.
        revision: of the CLIP on the hub.
        local_files_only: download nothing; take what is there.
        options: device, dtype (of the CLIP; the head is float32), batch_size, offload: see
            :class:`diffalign.rewards.base.Reward`.
    """

    name = "aesthetic"
    version = "transformers-crop-1"
    summary = "how people rate a picture's looks, 1 to 10, whatever its prompt"
    differentiable = True
    uses_prompt = False
    scale = "rating"
    typical: tuple[float, float] | None = (3.0, 8.0)
    input_size: int | None = 224
    memory_gb: float | None = 0.61
    licence = "Apache-2.0"
    hacks: tuple[str, ...] = (
        "It never saturates: pictures drift to one smooth, painterly style. A score of 8 and more is hacked.",
        "The prompt is not seen: anything pretty scores, whatever was asked for.",
        "Frames, bokeh, sunsets and signatures score, since rated art has them.",
    )

    def __init__(
        self,
        checkpoint: str = PUBLISHED,
        tower: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.checkpoint, self.tower_path = resolve(checkpoint), resolve(tower)
        self.processor = resolve(processor) if processor else self.tower_path
        self.revision, self.local_files_only = revision, local_files_only

    def load(self) -> None:
        file = locate(self.checkpoint, _FILES, what="aesthetic head", local_files_only=self.local_files_only)
        head = AestheticHead.from_state_dict(read_weights(file))
        options: dict[str, Any] = {"revision": self.revision, "local_files_only": self.local_files_only}
        tower = load_tower(self.tower_path, **options)
        wanted, given = head.widths[0], tower.config.projection_dim
        if wanted != given:
            raise UserError(
                f"the aesthetic head {self.checkpoint!r} takes embeddings of {wanted}, but {self.tower_path!r} gives "
                f"{given}: it was trained on another CLIP. Give that one as tower=."
            )
        if self.processor != self.tower_path:
            options["revision"] = None
        self.preprocess = load_preprocess(self.processor, advice=_ADVICE, **options)
        self.head = head.requires_grad_(False).to(self.device, self._head_dtype())
        self.tower = tower.to(self.device, self.dtype)
        self.input_size = self.preprocess.crop

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        pixels = self.preprocess(images, exact=not torch.is_grad_enabled())
        scores: Tensor = self.head(self.tower(pixel_values=pixels.to(self.dtype)).image_embeds)
        return scores

    def _head_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class ShapesAesthetic(Aesthetic):
    """The bundled head on the bundled CLIP: rates pictures of the shapes world from 1 to 10."""

    name = "shapes-aesthetic"
    summary = "clean pictures of the shapes world with large, centred things, 1 to 10"
    typical = (3.5, 8.5)
    input_size = 64
    memory_gb = None
    hacks = ("The prompt is not seen: one large thing in the middle scores, whatever was asked for.",)

    def __init__(self, checkpoint: str = "shapes-aesthetic", tower: str | None = None, **options: Any) -> None:
        if tower is None:
            tower = json.loads((Path(resolve(checkpoint)) / "config.json").read_text(encoding="utf-8"))["clip"]
        super().__init__(checkpoint, str(tower), **options)


def load_tower(path: str, **options: Any) -> CLIPVisionModelWithProjection:
    """The image half of a CLIP checkpoint, with its projection, frozen; the text half is not loaded.

    Args:
        options: revision, local_files_only.

    Raises:
        UserError: it is not there, or not a CLIP.
    """
    config = load_config(path, ("clip", "clip_vision_model"), **options)
    if config.model_type == "clip":
        config.vision_config.projection_dim = config.projection_dim  # a whole CLIP keeps it one level up
        config = config.vision_config
    tower: CLIPVisionModelWithProjection = load_model(_ImageHalf, path, config=config, **options)
    return tower


class _ImageHalf(CLIPVisionModelWithProjection):
    """Passes over the text half of a whole CLIP, which transformers otherwise lists weight by weight."""

    _keys_to_ignore_on_load_unexpected = (r"^text_model\.", r"^text_projection\.", r"^logit_scale$")
