"""Rewards that ``diffalign train-reward`` made: a CLIP of one's own, or a head on the embeddings of a frozen one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.assets import resolve
from diffalign.errors import UserError
from diffalign.rewards.base import Scores
from diffalign.rewards.checkpoints import fill, read_weights
from diffalign.rewards.clip import CLIPReward
from diffalign.rewards.encoders import Encoder, load_encoder

REWARD_FILE = "reward.json"
"""Says what the folder holds; written last, so a folder that has it is whole."""
HEAD_FILE = "head.safetensors"
FORMAT = 1


class RewardHead(nn.Module):
    """What is learnt on frozen unit embeddings: ``exp(logit_scale) cos(i, t) + f(i, i * t)``.

    The image's own part of the input is for taste, the product for how it fits the prompt. The last layer starts at
    zero, so training starts from the score of the CLIP below.

    Args:
        dim: of the embeddings.
        hidden: width of the one hidden layer (GELU); None for a linear f.
        dropout: before the last layer.
        logit_scale: of the CLIP below; it trains.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, dropout: float = 0.0, logit_scale: float = math.log(100)
    ) -> None:
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.first = nn.Sequential(nn.Linear(2 * dim, hidden), nn.GELU()) if hidden else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        # A constant would cancel in every comparison.
        self.last = nn.Linear(hidden or 2 * dim, 1, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Unit embeddings (B, P) of images and of their prompts to scores (B,)."""
        product = images * texts
        # Entries of a unit vector are about 1 / sqrt(P): bring both parts to about 1.
        features = torch.cat([images * self.dim**0.5, product * self.dim], dim=-1)
        taste: Tensor = self.last(self.dropout(self.first(features))).squeeze(-1)
        return self.logit_scale.exp() * product.sum(-1) + taste

    @torch.no_grad()
    def divide(self, temperature: float) -> None:
        """Divide all scores by a temperature above 0."""
        self.logit_scale.sub_(math.log(temperature))
        self.last.weight.div_(temperature)


class TrainedReward(CLIPReward):
    """A reward from ``diffalign train-reward``, named ``trained:FOLDER``: a Bradley-Terry logit.

    Args:
        checkpoint: the folder.
        options: processor, revision, local_files_only, device, dtype, batch_size: see
            :class:`diffalign.rewards.clip.CLIPReward`.

    Raises:
        UserError: no folder is named, or it is not of a finished run.
    """

    name = "trained"
    summary = "which of two pictures those would prefer whose choices it was trained on"
    licence = "that of its CLIP"
    hacks = ("It knows only what its pairs show: judge by another reward than the one trained on.",)
    default_checkpoint = ""

    def __init__(self, checkpoint: str | None = None, **options: Any) -> None:
        if not checkpoint:
            raise UserError("which trained reward? Write trained:FOLDER, with a folder of `diffalign train-reward`.")
        self.folder = Path(resolve(checkpoint)).expanduser()
        self.facts = read_facts(self.folder)
        self.head_folder = self.folder if self.facts["kind"] == "head" else None
        base = self.facts["base"] if self.head_folder else str(self.folder)
        options.setdefault("processor", self.facts["base_processor"] if self.head_folder else None)
        options.setdefault("revision", self.facts.get("base_revision") if self.head_folder else None)
        super().__init__(base, **options)
        self.typical = tuple(self.facts["typical"])

    def make_encoder(self) -> Encoder:
        return load_encoder(
            self.checkpoint, self.processor, revision=self.revision, local_files_only=self.local_files_only
        )

    def load(self) -> None:
        super().load()
        if self.head_folder:
            self.head = load_head(self.head_folder, self.facts).to(self.device)

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        if not self.head_folder:
            return super().score(images, prompts, metadata)
        embeddings, texts = self.encoder.embed(images), self._embed_prompts(prompts)
        return self.head(embeddings, texts), {"cosine": (embeddings * texts).sum(-1)}


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``reward.json`` says.

    Raises:
        UserError: it is missing, or written by a later version.
    """
    path = folder / REWARD_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is no trained reward: it has no {REWARD_FILE}. Give the output_dir of a `diffalign "
            "train-reward` that ran to its end; a plain CLIP is used as pickscore:FOLDER or clipscore:FOLDER."
        )
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {facts.get('format')!r}, but this version reads {FORMAT}: update diffalign"
        )
    return facts


def load_head(folder: Path, facts: Mapping[str, Any]) -> RewardHead:
    """The head in a folder, frozen, in eval mode, on the CPU.

    Raises:
        UserError: its weights are missing or of another shape.
    """
    head = RewardHead(facts["head"]["dim"], facts["head"]["hidden"])
    fill(head, read_weights(folder / HEAD_FILE), str(folder / HEAD_FILE), "reward head")
    return head.eval().requires_grad_(False)
