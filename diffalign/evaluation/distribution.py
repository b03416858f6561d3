"""How far the images of a model are from real ones as a whole: FID and KID, by torchmetrics.

Preference tuning usually raises both, and what people prefer goes the other way: they say how far a model has moved,
not how good it is. FID is biased at few images (10,000 are usual); KID is not. Inception v3 knows photographs; a CLIP
in its place fits other pictures better, and its distances are on a scale of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.evaluation.folder import Case, SampleFolder
from diffalign.evaluation.listing import list_images
from diffalign.rewards.clipscore import CLIPScore

T = TypeVar("T")
INCEPTION = "inception"
SIDE = 299
"""Pixels a side that Inception v3 sees."""
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_BATCH = 32
_SUBSET = 1000


class Realism:
    """The reference images and the features that images are compared by.

    Args:
        reference: folder of real images, or any source that :func:`diffalign.evaluation.listing.list_images` takes.
        images: of each model.
        features: "inception", or a CLIP as :class:`diffalign.rewards.clipscore.CLIPScore` takes it.
        device: of the features' model.

    Raises:
        UserError: fewer than two images, or torchmetrics or the features are not there: said before anything is drawn.
    """

    def __init__(self, reference: str, images: int, features: str = INCEPTION, device: str | None = None) -> None:
        self.features = features
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.real = list_images([reference])
        clip = None if features == INCEPTION else ClipFeatures(features)
        self.side = SIDE if clip is None else clip.side
        self.metrics = make_metrics(min(images, len(self.real), _SUBSET), 2048 if clip is None else clip)

    def distances(self, folders: Mapping[T, SampleFolder], cases: Sequence[Case]) -> dict[T, dict[str, float]]:
        """FID, KID and the standard deviation of KID over its subsets, of each model's images."""
        fid, kid = self.metrics
        for metric in (fid, kid):
            metric.to(self.device)
            for batch in _batches((_opened(image.path) for image in self.real), self.side):
                metric.update(batch.to(self.device), real=True)
        found = {}
        for key, folder in folders.items():
            for metric in (fid, kid):
                metric.reset()
                for batch in _batches((folder.image(case) for case in cases), self.side):
                    metric.update(batch.to(self.device), real=False)
            # KID draws its subsets at random.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                mean, spread = kid.compute()
            found[key] = {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(spread)}
        return found


class ClipFeatures(nn.Module):
    """A CLIP's embeddings of pictures, unit vectors, in the form that torchmetrics takes."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        reward = CLIPScore(checkpoint, device="cpu")
        reward.prepare()
        self.encoder = reward.encoder
        self.side = int(reward.input_size or SIDE)
        self.num_features = len(self(torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8))[0])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, d) float64."""
        return self.encoder.embed(images.float() / 255).double()


def make_metrics(subset: int, feature: Any = 2048) -> tuple[Any, Any]:
    """FID and KID of torchmetrics, which keep the statistics of the real images when they are reset.

    Args:
        subset: images in a subset of KID, >= 2.
        feature: layer of Inception v3, or a module (B, 3, 299, 299) uint8 -> (B, d) in its place.

    Raises:
        UserError: torchmetrics or its Inception v3 is not there, or the subset is too small.
    """
    if subset < 2:
        raise UserError("FID and KID need at least two images of each model and two reference images")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        return (
            FrechetInceptionDistance(feature, reset_real_features=False),
            KernelInceptionDistance(feature, subsets=50, subset_size=subset, reset_real_features=False),
        )
    except ModuleNotFoundError as error:
        raise UserError(
            f"reference_images needs torchmetrics with its Inception v3 ({error}): pip install 'diffalign[fid]'; or "
            "name a CLIP to compare by, which only torchmetrics is needed for: --reference_features shapes-clip"
        ) from error
    except OSError as error:  # its weights are downloaded when it is made
        raise UserError(
            f"the weights of Inception v3 cannot be had: {error}. torch-fidelity downloads them once: do so where "
            f"there is a network, and copy {_INCEPTION_FILE} to {Path(torch.hub.get_dir()) / 'checkpoints'}. Or name "
            "a CLIP to compare by: --reference_features openai/clip-vit-large-patch14"
        ) from error


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"the reference image {path} cannot be read: {error}") from error


def _batches(images: Iterable[Image.Image], side: int) -> Iterator[Tensor]:
    """uint8 batches (B, 3, side, side), by Pillow's antialiased bicubic (Parmar et al. 2022, "clean FID")."""
    batch = []
    for image in images:
        small = image.resize((side, side), Image.Resampling.BICUBIC)
        batch.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
        if len(batch) == _BATCH:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)
