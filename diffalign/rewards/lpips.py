"""LPIPS between the images of one prompt (Zhang et al. 2018, arXiv 1801.03924), by torchmetrics."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.base import Reward, RewardOutput

_BACKBONES = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
"""Names of LPIPS's networks, and the torchvision weights that each is on top of."""


class LPIPSDiversity(Reward):
    """Mean LPIPS from an image to the others of its prompt, >= 0: how different they look, up close.

    Its mean over a prompt's images is their mean pairwise LPIPS. A prompt with one image has no score. CLIP's distance
    tells apart what is shown; this one textures, colours and places.

    Args:
        network: "alex", "vgg" or "squeeze". Its ImageNet weights are torchvision's, downloaded once.
        options: device, dtype, batch_size: see :class:`diffalign.rewards.base.Reward`.

    Raises:
        UserError: there is no such network, or torchmetrics or torchvision is not installed; from ``prepare``: the
            weights are not there and cannot be downloaded.
    """

    name = "lpips"
    version = "1"
    summary = "how different an image looks from the others of its prompt, by LPIPS"
    mode = "groupwise"
    uses_prompt = False
    typical = (0.0, 1.5)
    licence = "BSD-2-Clause (LPIPS), BSD-3-Clause (torchvision)"
    hacks = ("Noise and defects are diverse too: read it beside a score of quality.",)

    def __init__(self, network: Literal["alex", "vgg", "squeeze"] = "alex", **options: Any) -> None:
        super().__init__(**options)
        if network not in _BACKBONES:
            raise UserError(
                f"the network of lpips is {network!r}.{did_you_mean(network, _BACKBONES)} Choose of "
                f"{', '.join(_BACKBONES)}."
            )
        self.network = network
        try:
            import torchmetrics  # noqa: F401
            import torchvision  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(
                f"lpips needs torchmetrics and torchvision ({error}): pip install 'diffalign[fid]'"
            ) from error

    def load(self) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric = LearnedPerceptualImagePatchSimilarity(self.network, reduction="none", normalize=True)
        except (
            OSError,
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:  # no network; a file that was cut off
            url, file = self.weights_file()
            raise UserError(
                f"lpips cannot have the weights of its network {self.network!r}: {error}. Download {url} on a machine "
                f"that can, and put it at {file}."
            ) from error
        self.metric = metric.to(self.device)

    def weights_file(self) -> tuple[str, Path]:
        """Where the network's weights come from, and where torchvision keeps them."""
        import torchvision

        url = getattr(torchvision.models, _BACKBONES[self.network]).DEFAULT.url
        return url, Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name

    def score(  # type: ignore[override]
        self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]], group_ids: list[int]
    ) -> RewardOutput:
        scores = torch.full((len(images),), torch.nan, device=images.device)
        for group in dict.fromkeys(group_ids):
            rows = [i for i, other in enumerate(group_ids) if other == group]
            if len(rows) > 1:
                scores[rows] = self._mean_distances(images[rows])
        valid = torch.isfinite(scores)
        messages = [None if ok else "its prompt has no other image to differ from" for ok in valid.tolist()]
        return RewardOutput(scores, {}, valid, messages)

    def _mean_distances(self, images: Tensor) -> Tensor:
        """Mean LPIPS from each of n >= 2 images (n, 3, H, W) in [0, 1] to the others, (n,)."""
        pairs = torch.tensor(list(itertools.combinations(range(len(images)), 2)), device=images.device)
        found = []
        for part in pairs.split(self.batch_size):
            found.append(self.metric(images[part[:, 0]], images[part[:, 1]]).reshape(-1))
            self.metric.reset()
        sums = torch.zeros(len(images), device=images.device)
        values = torch.cat(found).to(sums)
        sums.index_add_(0, pairs[:, 0], values).index_add_(0, pairs[:, 1], values)
        return sums / (len(images) - 1)
