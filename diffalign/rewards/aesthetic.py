"""The LAION aesthetic predictor v2: a score of 1 to 10 from a CLIP image embedding, without a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffalign.assets import resolve
from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import load_from, load_model, load_preprocess

LAION_WIDTHS = (768, 1024, 128, 64, 16, 1)
_DROPOUT = (0.2, 0.2, 0.1, 0.0, 0.0)
_LINEARS = (0, 2, 4, 6, 7)
_RELU_LINEARS = (0, 3, 6, 9, 11)
_SOURCE = "https://github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth)"


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
        unit = normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)
        scores: Tensor = self.layers(unit).squeeze(-1)
        return scores


class Aesthetic(Reward):
    """The LAION aesthetic score: about 4.5 to 6.5 for pictures, differentiable, and easily overdone.

    Without activations it is one linear function of the embedding, which never saturates: train on it only with a cap
    or a target. 8 and more means that it has been exploited.

    Args:
        checkpoint: the head's weights, a ``.pth`` or ``.safetensors`` file, or a folder with ``model.safetensors``.
        tower: folder, hub id or bundled name of the CLIP it was trained on.
        options: device, dtype (of the CLIP; the head is float32), batch_size: see
            :class:`diffalign.rewards.base.Reward`.

    Raises:
        UserError: no checkpoint is given.
    """

    name = "aesthetic"
    summary = "how people rate a picture's looks, 1 to 10, whatever its prompt"
    differentiable = True
    uses_prompt = False
    scale = "rating"
    typical: tuple[float, float] | None = (3.0, 8.0)

    def __init__(
        self, checkpoint: str | None = None, tower: str = "openai/clip-vit-large-patch14", **options: Any
    ) -> None:
        super().__init__(**options)
        if checkpoint is None:
            raise UserError(
                f"the reward {self.name} needs the file of its head: write {self.name}:path/to/file.pth. "
                f"The published one is at {_SOURCE}."
            )
        self.checkpoint, self.tower_path = resolve(checkpoint), resolve(tower)

    def load(self) -> None:
        head = AestheticHead.from_state_dict(read_weights(self.checkpoint))
        tower = load_tower(self.tower_path)
        wanted, given = head.widths[0], tower.config.projection_dim
        if wanted != given:
            raise UserError(
                f"the aesthetic head {self.checkpoint!r} takes embeddings of {wanted}, but {self.tower_path!r} gives "
                f"{given}: it was trained on another CLIP"
            )
        self.head = head.requires_grad_(False).to(self.device)
        self.tower = tower.to(self.device, self.dtype)
        self.preprocess = load_preprocess(self.tower_path)
        self.input_size = self.preprocess.crop

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        pixels = self.preprocess(images, exact=not torch.is_grad_enabled())
        scores: Tensor = self.head(self.tower(pixel_values=pixels.to(self.dtype)).image_embeds)
        return scores


class ShapesAesthetic(Aesthetic):
    """The bundled head on the bundled CLIP: rates pictures of the shapes world from 1 to 10."""

    name = "shapes-aesthetic"
    summary = "clean pictures of the shapes world with large, centred things, 1 to 10"
    typical = None

    def __init__(self, checkpoint: str = "shapes-aesthetic", tower: str | None = None, **options: Any) -> None:
        if tower is None:
            tower = json.loads((Path(resolve(checkpoint)) / "config.json").read_text(encoding="utf-8"))["clip"]
        super().__init__(checkpoint, str(tower), **options)


def load_tower(path: str) -> CLIPVisionModelWithProjection:
    """The image half of a CLIP checkpoint, with its projection, frozen; the text half is not loaded.

    Raises:
        UserError: it is not there, or not a CLIP.
    """
    config = load_from(AutoConfig.from_pretrained, path)
    if isinstance(config, CLIPConfig):
        config.vision_config.projection_dim = config.projection_dim  # a whole CLIP keeps it one level up
        config = config.vision_config
    if not isinstance(config, CLIPVisionConfig):
        raise UserError(f"{path!r} is a {config.model_type}, not a CLIP")
    tower: CLIPVisionModelWithProjection = load_model(CLIPVisionModelWithProjection, path, config=config)
    return tower


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or torch file, or of ``model.safetensors`` in a folder, on the CPU.

    Raises:
        UserError: there is no such file, or a torch file holds more than tensors.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise UserError(f"there is no weight file {file}")
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} is not a plain file of tensors, and nothing else is loaded: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds a {type(state).__name__}, not tensors by name")
    return state
