"""How different the images of one prompt are: what alignment costs nearly always, and no score of an image shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.clipscore import CLIPScore

_SMALLEST = 1e-12


def vendi_score(features: Tensor, q: float = 1.0) -> Tensor:
    """Effective number of different images (Friedman and Dieng 2022, "The Vendi Score", arXiv 2210.02410).

    exp(-sum l log l) over the eigenvalues l of K / n, where K holds the cosines: 1 for n equal images, n for n that
    have nothing in common. For another order q (Pasarkar and Dieng 2023):
    (sum l^q)^(1 / (1 - q)), and 1 / max l for infinity.

    Args:
        features: (n, d), n >= 1; normalised here.
        q: order, > 0; small ones give rare images more weight.

    Returns:
        A float64 scalar in [1, n].
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    values = torch.linalg.eigvalsh(unit @ unit.T / len(unit))
    values = values[values > _SMALLEST]
    if q == 1:
        return (-(values * values.log()).sum()).exp()
    if q == float("inf"):
        return 1 / values.max()
    return (values**q).sum() ** (1 / (1 - q))


def mean_distances(features: Tensor) -> Tensor:
    """Mean of 1 - cosine from each of n >= 2 rows to the others, (n,) float64 in [0, 2]."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    cosines = unit @ unit.T
    return 1 - (cosines.sum(1) - cosines.diagonal()) / (len(unit) - 1)


class Diversity(CLIPScore):
    """Mean distance, 1 - cosine of CLIP's embeddings, from an image to the others of its prompt, in [0, 2].

    Its mean over a prompt's images is their mean pairwise distance. ``details["vendi"]`` is the Vendi score of the
    prompt's images. A prompt with one image has no score. Arguments are those of
    :class:`diffalign.rewards.clipscore.CLIPScore`; only the CLIP's image half counts.
    """

    name = "diversity"
    version = "clip-1"
    summary = "how different an image is from the others of its prompt, in the eyes of a CLIP"
    mode = "groupwise"
    uses_prompt = False
    differentiable = False
    scale = "cosine"
    typical: tuple[float, float] | None = (0.0, 1.0)
    hacks: tuple[str, ...] = ("Noise and defects are diverse too: read it beside a score of quality.",)  # type: ignore[assignment]

    def __init__(self, checkpoint: str | None = None, processor: str | None = None, **options: Any) -> None:
        super().__init__(checkpoint, processor, "cosine", **options)
        self.name = type(self).name

    def _usual(self, encoder: Any) -> tuple[float, float] | None:
        return self.typical

    def score(  # type: ignore[override]
        self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]], group_ids: list[int]
    ) -> Any:
        from diffalign.rewards.output import RewardOutput

        features = self.encoder.embed(images).double()
        scores = torch.full((len(images),), torch.nan, dtype=torch.float64, device=features.device)
        vendi = scores.clone()
        for group in dict.fromkeys(group_ids):
            rows = torch.tensor([i for i, other in enumerate(group_ids) if other == group], device=features.device)
            if len(rows) > 1:
                scores[rows] = mean_distances(features[rows])
                vendi[rows] = vendi_score(features[rows])
        valid = torch.isfinite(scores)
        messages = [None if ok else "its prompt has no other image to differ from" for ok in valid.tolist()]
        return RewardOutput(scores.float(), {"vendi": vendi.float()}, valid, messages)
